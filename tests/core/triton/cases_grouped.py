"""Layers that are served together, through the functions that training calls.

`test_passes.py` runs this file.
"""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from snell_diffusion.core.triton import fused, ops
from snell_diffusion.tuners import SnellaConfig, delta_layers, grouping
from tests.core.triton.layers import DEVICE

torch.manual_seed(0)
X = torch.randn(5, 32).to(DEVICE)


def adapted(rule="squared", dtype=torch.float32):
    """Three layers of one shape, whose levels, scale and factors are their own."""
    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))).requires_grad_(False)
    config = SnellaConfig.paper(target_modules=["0", "1", "2"], r=16, sparsify=rule, scale=0.5)
    model = inject_adapter_in_model(config, net.to(DEVICE, dtype)).train()
    for i, (_, layer) in enumerate(delta_layers(model)):
        if rule != "none":
            layer.set_sparsity("default", 0.2 + 0.2 * i)
        with torch.no_grad():
            for p in layer.delta_params("default"):
                p.add_(torch.randn(p.shape).to(DEVICE) * 0.1)
    return model


def step(model):
    y = model(X.to(model[0].base_layer.weight.dtype))
    y.float().square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def calls_of(monkeypatch, *names):
    """How often each function of `ops` was called."""
    counts = dict.fromkeys(names, 0)

    def counting(name, works):
        def run(*args, **kwargs):
            counts[name] += 1
            return works(*args, **kwargs)

        return run

    for name in names:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counts


def assert_alike(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        largest = float(want[name].abs().max())
        off = float((gradient - want[name]).abs().max())
        assert off <= tolerance * max(largest, 1e-20), name


@pytest.mark.parametrize("rule", ["squared", "mask", "none"])
def test_small_layers_take_one_launch_of_each(rule, monkeypatch):
    alone = adapted(rule)
    together = copy.deepcopy(alone)
    grouping.group_small_layers(together)
    counts = calls_of(monkeypatch, "write", "backward", "thresholds")
    got = step(together)
    assert counts == {"write": 1, "backward": 1, "thresholds": int(rule != "none")}
    with fused.switched_off():
        want = step(alone)
    assert_alike(got, want, 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_layers_and_16_bit_ones_share_their_thresholds(dtype, monkeypatch):
    monkeypatch.setattr(grouping, "LAYER_ENTRIES", 0)
    monkeypatch.setattr(grouping, "on_gpu", lambda layer: True)  # under the interpreter, too
    alone = adapted(dtype=dtype)
    together = copy.deepcopy(alone)
    grouping.group_small_layers(together)
    counts = calls_of(monkeypatch, "write", "thresholds")
    got = step(together)
    assert counts == {"write": 6, "thresholds": 1}
    assert not any(layer.limits for _, layer in delta_layers(together))
    with fused.switched_off():
        want = step(alone)
    assert_alike(got, want, 2e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("failing", ["write", "backward", "thresholds"])
def test_a_launch_that_fails_is_made_good(failing, monkeypatch):
    monkeypatch.setattr(fused, "_failures", [])
    alone = adapted()
    together = copy.deepcopy(alone)
    grouping.group_small_layers(together)

    def fails(*args):
        raise fused.failed("out of resources")

    monkeypatch.setattr(ops, failing, fails)
    got = step(together)
    with fused.switched_off():
        want = step(alone)
    assert_alike(got, want, 2e-4)
