"""Skipping the arithmetic of alike layers changes no figure."""

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import fake_cost
from benchmarks.shortened import operations
from benchmarks.works import WORKS, vit

SMALL = replace(WORKS["vit-b"], build=vit(96, 2, 2, 32))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_those_of_all_layers_computed(checkpointing, dtype):
    short, whole = (
        fake_cost(SMALL, "ours", 1, dtype, checkpointing, whole)[0] for whole in (False, True)
    )
    assert short.flops == whole.flops
    for name in ("saved", "peak", "backward_peak"):
        # A threshold and a stand-in's lack of one are a few bytes a layer.
        assert short.values()[name] == pytest.approx(whole.values()[name], abs=100 * 12)


def test_an_update_is_recomputed_where_layers_are():
    once, twice = (operations((64, 96), again, torch.float32) for again in (False, True))
    assert 0 < once < twice < 2 * once
