"""The best adapter: what counts as better, when a run ends, and what a checkpoint brings back."""

import math

import pytest
import torch
from torch import nn

from snell_diffusion.training.adapter_tensors import adapter_tensors
from snell_diffusion.training.early_stop import BestAdapter
from snell_diffusion.training.errors import CheckpointError
from tests.tiny_models import adapt


@pytest.fixture
def components() -> dict[str, nn.Module]:
    return {"net": adapt(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])}


def fill(components: dict[str, nn.Module], value: float) -> None:
    with torch.no_grad():
        for tensor in adapter_tensors(components).values():
            tensor.fill_(value)


def values(components: dict[str, nn.Module]) -> set[float]:
    return {float(t.detach().flatten()[0]) for t in adapter_tensors(components).values()}


def test_the_lowest_loss_is_kept(components: dict[str, nn.Module]) -> None:
    best = BestAdapter(components, patience=2, min_delta=0.0)
    for step, loss in enumerate([3.0, 1.0, 2.0]):
        fill(components, step)
        best.observe(step, loss)
    assert (best.loss, best.step, best.misses, best.exhausted) == (1.0, 1, 1, False)
    with best.applied():
        assert values(components) == {1.0}
    assert values(components) == {2.0}


@pytest.mark.parametrize(
    "losses, misses",
    [([1.0, 1.0], 1), ([1.0, 0.95], 1), ([1.0, 0.85], 0), ([1.0, math.nan], 1), ([1.0, None], 1)],
)
def test_what_counts_as_better(
    components: dict[str, nn.Module], losses: list[float | None], misses: int
) -> None:
    best = BestAdapter(components, patience=5, min_delta=0.1)
    for step, loss in enumerate(losses):
        best.observe(step, loss)
    assert best.misses == misses


def test_it_ends_after_patience_measurements_in_a_row(components: dict[str, nn.Module]) -> None:
    best = BestAdapter(components, patience=2, min_delta=0.0)
    ended = []
    for step, loss in enumerate([2.0, 2.5, 1.0, 1.5, 1.0]):
        best.observe(step, loss)
        ended.append(best.exhausted)
    assert ended == [False, False, False, False, True]


def test_a_checkpoint_brings_it_back(components: dict[str, nn.Module]) -> None:
    best = BestAdapter(components, patience=2, min_delta=0.0)
    again = BestAdapter(components, patience=2, min_delta=0.0)
    again.load(best.state_dict(), best.tensors)
    assert again.loss == math.inf
    best.observe(3, 0.1)
    fill(components, 9.0)
    again.load(best.state_dict(), best.tensors)
    assert (again.loss, again.step) == (0.1, 3)
    with again.applied(), best.applied():
        assert 9.0 not in values(components)


@pytest.mark.parametrize("change", [{"loss": "nan"}, {"loss": "x"}, {"step": -1}, {"misses": -1}])
def test_a_damaged_state_is_refused(
    components: dict[str, nn.Module], change: dict[str, object]
) -> None:
    best = BestAdapter(components, patience=2, min_delta=0.0)
    with pytest.raises(CheckpointError, match="saved best measurement is damaged"):
        best.load({**best.state_dict(), **change}, best.tensors)
    assert best.step == 0
