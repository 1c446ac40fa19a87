"""Read the golden cases (README.md): configuration, tolerance and tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent
MANIFEST: dict[str, Any] = json.loads((ROOT / "manifest.json").read_text())
DTYPES = {"f64": torch.float64, "f32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One entry of the manifest."""

    entry: dict[str, Any]

    def __str__(self) -> str:
        return str(self.entry["id"])

    @property
    def config(self) -> dict[str, Any]:
        return self.entry["config"]

    @property
    def method(self) -> str:
        return self.entry["method"].lower()

    def tensors(self, precision: str = "f64") -> dict[str, Tensor]:
        """All tensors; the given inputs (plain float32 names) cast to the precision of the run."""
        dtype = DTYPES[precision]
        loaded = load_file(ROOT / self.entry["file"])
        return {
            name: t if name.endswith((".f64", ".f32")) or t.dtype != torch.float32 else t.to(dtype)
            for name, t in loaded.items()
        }

    def assert_close(self, got: Tensor, want: Tensor, precision: str, what: str) -> None:
        """|got - want| <= atol + rtol |want| with the manifest's tolerance for this precision."""
        tolerance = self.entry["tolerance"][precision]
        atol = tolerance.get("atol", 0.0)
        if "atol_of_max" in tolerance:
            atol = tolerance["atol_of_max"] * float(want.abs().max())
        torch.testing.assert_close(
            got.detach().reshape(want.shape).to(want.dtype),
            want,
            rtol=tolerance["rtol"],
            atol=atol,
            msg=lambda m: f"{self} {precision} {what}: {m}",
        )


def cases(kind: str) -> list[Case]:
    """The cases of one kind, in the manifest's order."""
    return [Case(entry) for entry in MANIFEST["cases"] if entry["kind"] == kind]
