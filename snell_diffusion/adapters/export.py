"""What an adapter adds to each weight, and how far an exported file is from it.

An export is a file for programs that do not know SNELLA: the update itself, dense (O, I), is all
they can take. Shape legend: O out features, I in features, r rank.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.adapters.attach import form_in, skeleton, zero_layer
from snell_diffusion.adapters.load import load_adapter
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.state import adapter_layers
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners import METHODS, DeltaLayer
from snell_diffusion.tuners.transform import TransformLayer

__all__ = [
    "EXPORT_KEY",
    "ExportReport",
    "LayerError",
    "export_dtype",
    "layer_updates",
    "update_layers",
]

EXPORT_KEY = "snella.export"
NAME = "export"  # of the adapter inside this module's throwaway models

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_dtype(name: str) -> torch.dtype:
    """The dtype of a name, one of float32, float16, bfloat16.

    Raises:
        SnellaValueError: Another name.
    """
    if name not in DTYPES:
        raise SnellaValueError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class LayerError:
    """How far one layer of an export is from the adapter's update ΔW.

    Attributes:
        layer: `<component>.<module path>`.
        shape: (out features, in features).
        norm: |ΔW|, Frobenius.
        off: |what was written − ΔW|, Frobenius; rounding to the file's dtype included.
        energy: Share of |ΔW|² that the written update has before rounding, 0 to 1.
    """

    layer: str
    shape: tuple[int, int]
    norm: float
    off: float
    energy: float = 1.0

    @property
    def relative(self) -> float:
        """off / norm; 0 where the update is zero."""
        return self.off / self.norm if self.norm > 0 else 0.0

    @classmethod
    def of(cls, layer: str, delta: Tensor, written: Tensor, energy: float = 1.0) -> "LayerError":
        """Compare an update with what was written, both (O, I), in float64."""
        off = torch.linalg.vector_norm(written.double() - delta.double())
        norm = torch.linalg.vector_norm(delta.double())
        return cls(layer, (delta.shape[0], delta.shape[1]), float(norm), float(off), energy)


@dataclass(frozen=True)
class ExportReport:
    """What was exported and the error it makes.

    Attributes:
        format: merged, lora or kohya.
        path: The file or folder.
        dtype: Name of the stored dtype.
        rank: Columns per layer; None for merged weights, which have full rank.
        source: The adapter's file, hub id or "state dict".
        digest: The adapter's digest, None for a state dict.
        layers: One row per layer, in the model's order.
    """

    format: str
    path: str
    dtype: str
    rank: int | None
    source: str
    digest: str | None
    layers: tuple[LayerError, ...]

    @property
    def relative(self) -> float:
        """|written − ΔW| / |ΔW| over all layers together (Frobenius)."""
        norm = math.hypot(*(row.norm for row in self.layers))
        return math.hypot(*(row.off for row in self.layers)) / norm if norm > 0 else 0.0

    @property
    def energy(self) -> float:
        """Share of Σ |ΔW|² that the chosen rank keeps, over all layers."""
        total = sum(row.norm**2 for row in self.layers)
        return sum(row.energy * row.norm**2 for row in self.layers) / total if total > 0 else 1.0

    def to_json(self) -> str:
        """The text that goes into the export's metadata under `snella.export`."""
        from snell_diffusion import __version__

        data: dict[str, Any] = {
            "writer": f"snell_diffusion {__version__}",
            "format": self.format,
            "dtype": self.dtype,
            "rank": self.rank,
            "adapter_digest": self.digest,
            "relative_error": self.relative,
            "energy_kept": self.energy,
            "layers": {
                row.layer: {"relative_error": row.relative, "energy_kept": row.energy}
                for row in self.layers
            },
        }
        return json.dumps(data, allow_nan=False)

    def table(self) -> str:
        """A page of text: one line per layer, and the whole."""
        width = max(len(row.layer) for row in self.layers)
        lines = [f"{'layer':<{width}}  {'[out, in]':>13}  {'|ΔW|':>9}  rel. error  energy kept"]
        lines += [
            f"{row.layer:<{width}}  {list(row.shape)!s:>13}  {row.norm:9.3g}  {row.relative:10.3g}"
            f"  {row.energy:11.2%}"
            for row in self.layers
        ]
        what = "full rank" if self.rank is None else f"rank {self.rank}"
        lines.append(
            f"all {len(self.layers)} layers as {self.format}, {what}, {self.dtype}: "
            f"relative error {self.relative:.3g}, {self.energy:.2%} of the energy kept"
        )
        return "\n".join(lines)


def update_layers(file: AdapterFile) -> dict[tuple[str, str], DeltaLayer]:
    """The layers by (component, module path), whose `get_delta_weight(NAME)` is ΔW; needs no model.

    Raises:
        SnellaError: As `load_adapter`: tensors that do not fit the layer table or each other.
        SnellaValueError: A method whose effect is no such matrix.
    """
    for part in file.header.components.values():
        layer = METHODS[part.method.upper()].model.tuner_layer_cls
        if issubclass(layer, TransformLayer):
            raise SnellaValueError(
                f"{file.source}: method {part.method!r} is no matrix added to each weight, which "
                "this needs: load the adapter with load_snella_weights, or, where the method can "
                "be merged, export it with --format merged"
            )
    models: dict[str, nn.Module] = {
        name: skeleton({path: zero_layer(form_in(row)) for path, row in part.layers.items()})
        for name, part in file.header.components.items()
    }
    updates = file.without_tokens()
    load_adapter(models, updates, NAME, allow_other_base=True, max_relative_update=math.inf)
    return {(component, path): layer for component, path, layer in adapter_layers(models, NAME)}


def layer_updates(file: AdapterFile) -> Iterator[tuple[str, str, Tensor]]:
    """(component, module path, ΔW [O, I]) of every layer, scale included; raises as above."""
    with torch.no_grad():
        for (component, path), layer in update_layers(file).items():
            yield component, path, layer.get_delta_weight(NAME)


def export_notes(file: AdapterFile) -> Mapping[str, str]:
    """The adapter's own metadata (prompts, training) as texts for an export's metadata.

    Their names cannot meet those of a header: an export must not pass for an adapter.
    """
    return {f"snella.metadata.{name}": str(value) for name, value in file.header.metadata.items()}
