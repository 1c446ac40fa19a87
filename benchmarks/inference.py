"""The forward pass with an adapter loaded, against the base alone.

python -m benchmarks.inference            all
python -m benchmarks.inference vit-b      one

base     the model without adapter
cached   the adapter loaded, as it is used by default; its first call is not timed
fused    the adapter added to the weights
"""

import copy
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.layers import TARGETS, LinearModel
from benchmarks.methods import ADAPTER, adapt, twin
from benchmarks.results import Entry
from benchmarks.section import Measure, Run, main
from benchmarks.shapes import Linear
from benchmarks.works import QUICK, WORKS, Inputs
from snell_diffusion.tuners import delta_layers

_TIMES = 4  # as many rounds as elsewhere: the ratios are close to 1
_UPDATE = 0.1  # |ΔW| / |W| of a finished adapter


class Call:
    """A forward pass without gradients."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self._inputs = model.eval(), inputs

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.model(**self._inputs)


def finished(model: nn.Module) -> nn.Module:
    """As loading leaves it: frozen, its updates a tenth of the weights as after training."""
    for _, layer in delta_layers(model, ADAPTER):
        with torch.no_grad():
            weight = layer.get_base_layer().weight
            size = layer.get_delta_weight(ADAPTER).norm() / weight.float().norm()
        layer.set_scale(ADAPTER, _UPDATE / float(size))
    return model.requires_grad_(False)


def compare_calls(
    base: nn.Module, targets: list[str], inputs: Inputs, run: Run, times: int = _TIMES
) -> Entry:
    """The three ways on one model; only `fused` has weights of its own."""
    cached = finished(adapt(twin(base), "ours", targets))
    fused = finished(adapt(copy.deepcopy(base), "ours", targets))
    for _, layer in delta_layers(fused, ADAPTER):
        layer.merge()
    models = {"base": base.requires_grad_(False), "cached": cached, "fused": fused}
    calls = {name: Call(model, inputs) for name, model in models.items()}
    return {"seconds": run.time(calls, times=1 if run.quick else times)}


def linear(shape: Linear, run: Run) -> Entry:
    """A single Linear."""
    inputs, outputs, tokens = (min(n, 64) for n in shape) if run.quick else shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    with run.device:
        base = LinearModel(inputs, outputs, dtype)
        x = torch.randn(tokens, inputs, dtype=dtype)
    return compare_calls(base, list(TARGETS), {"x": x}, run)


def model(name: str, batch: int, run: Run, times: int = _TIMES) -> Entry:
    """A whole model."""
    work = WORKS[QUICK.get(name, name) if run.quick else name]
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    with run.device:
        base = work.model(dtype)
        inputs = work.inputs(1 if run.quick else batch, dtype)
    found = compare_calls(base, work.paths(base), inputs, run, times)
    return {"title": work.title, "batch": batch, **found}


_LINEARS = (
    *(Linear(768, 3072, 1576), Linear(1280, 1280, 256)),
    *(Linear(320, 320, 4096), Linear(768, 320, 77)),
)
ENTRIES: dict[str, Measure] = {
    **{shape.name: partial(linear, shape) for shape in _LINEARS},
    "embedded-unet": partial(model, "embedded-unet", 4),
    "embedded-dit": partial(model, "embedded-dit", 4),
    "vit-b": partial(model, "vit-b", 1),
    "sd15": partial(model, "sd15", 1, times=2),
}

if __name__ == "__main__":
    sys.exit(main("inference", ENTRIES, rounds=3))
