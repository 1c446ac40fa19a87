"""What others rely on: public names, what an import loads, and the golden files themselves."""

import inspect
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import snell_diffusion.core as core
from tests.golden.cases import MANIFEST, ROOT


def test_public_names_and_arguments() -> None:
    wanted = {
        "distance_kernel": ["A", "B", "signs", "p"],
        "linear_kernel": ["A", "B", "signs"],
        "mix": ["K", "alpha", "gamma", "beta"],
        "sparsify": ["w", "sparsity", "rule", "threshold"],
        "threshold": ["w", "sparsity"],
        "kept_count": ["size", "sparsity"],
        "sparsity_for": ["size", "keep"],
        "merged_linear": ["x", "weight", "bias", "delta_fn", "params", "folds"],
        "Allocator": [
            *("sizes", "init_sparsity", "target_sparsity", "init_warmup", "final_warmup"),
            *("interval", "total", "beta1", "beta2", "metric", "exact", "strict"),
        ],
    }
    for name, arguments in wanted.items():
        assert list(inspect.signature(getattr(core, name)).parameters) == arguments, name
    assert set(wanted) <= set(core.__all__)
    assert core.RULES[0] == "squared"
    assert {"printed", "mask", "soft", "none"} < set(core.RULES)


def test_importing_core_loads_no_model_library() -> None:
    heavy = {"peft", "diffusers", "transformers", "accelerate", "gradio"}
    code = f"import sys, snell_diffusion.core; print({heavy} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


def test_every_golden_file_is_in_the_manifest() -> None:
    files = {path.name for path in ROOT.glob("*.safetensors")}
    assert files == {entry["file"] for entry in MANIFEST["cases"]}


@pytest.mark.parametrize("entry", MANIFEST["cases"], ids=lambda entry: entry["id"])
def test_golden_tensors_are_as_the_manifest_says(entry: dict) -> None:
    with safe_open(ROOT / entry["file"], "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == entry["tensors"].keys()
    for name, tensor in found.items():
        described = entry["tensors"][name]
        assert list(tensor.shape) == described["shape"], name
        assert tensor.dtype == getattr(torch, described["dtype"]), name
