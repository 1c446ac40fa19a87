"""The learning rate, against numbers of the public scripts and against the formula's ends."""

import itertools
import math
from typing import Any

import pytest
import torch

from snell_diffusion.vision.schedule import build_scheduler, rate_at
from tests.vision import runs

PER_EPOCH = 7


def rates(steps: int, **changes: Any) -> list[float]:
    """What an optimizer sees in each step."""
    config = runs.config("base", runs.Path("pictures"), None, **changes)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=config.learning_rate)
    scheduler = build_scheduler(config, optimizer, PER_EPOCH, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_published_schedule() -> None:
    """100 epochs, lr 1e-3, 10 of warmup from 1e-6, floor 1e-5: epochs 0 and 1 at 1e-6, epoch 2 at
    about 1e-4, the peak of 0.98e-3 in epoch 11 (measured with the public scripts)."""
    found = rates(100 * PER_EPOCH, protocol="paper", num_train_epochs=100, learning_rate=1e-3)
    epochs = [found[i * PER_EPOCH] for i in range(100)]
    assert all(found[i] == epochs[i // PER_EPOCH] for i in range(len(found)))
    assert epochs[0] == pytest.approx(1e-6)
    assert epochs[1] == pytest.approx(1e-6)
    assert epochs[2] == pytest.approx(1.009e-4, rel=1e-9)
    assert max(epochs) == epochs[11]
    assert epochs[11] == pytest.approx(0.98e-3, rel=0.005)
    assert epochs[10] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 9 / 10, rel=1e-9)
    # τ is the finished epoch's share of all epochs, warmup included.
    expected = 1e-5 + 0.99e-3 * (1 + math.cos(math.pi * 0.98)) / 2
    assert epochs[99] == pytest.approx(expected, rel=1e-9)


def test_own_schedule() -> None:
    """Up in a line, down in a cosine, from and to zero, symmetric about the middle of the fall."""
    steps = 20 * PER_EPOCH
    found = rates(steps, num_train_epochs=20, learning_rate=0.1, warmup_epochs=4.0)
    warm = 4 * PER_EPOCH
    assert found[0] == pytest.approx(0.1 * 0.5 / warm)
    assert found[warm - 1] == pytest.approx(0.1 * (warm - 0.5) / warm)
    assert max(found) == found[warm]
    fall = found[warm:]
    assert all(later < earlier for earlier, later in itertools.pairwise(fall))
    for early, late in zip(fall, reversed(fall), strict=True):
        assert early + late == pytest.approx(0.1)
    assert 0 < found[-1] < 1e-4


def test_constant_and_floor() -> None:
    constant = rates(30, lr_scheduler="constant", warmup_epochs=1.0, learning_rate=0.1)
    assert constant[PER_EPOCH:] == pytest.approx([0.1] * (30 - PER_EPOCH))
    floored = rates(30, min_lr=0.02, warmup_epochs=0.0, learning_rate=0.1)
    assert min(floored) >= 0.02
    assert floored[0] > 0.099


@pytest.mark.parametrize("update", ["step", "epoch"])
def test_rates_of_groups_below_the_floor_stay_at_their_own(update: str) -> None:
    """A group's own rate is never exceeded, whatever start and floor say."""
    config = runs.config("base", runs.Path("pictures"), None, protocol="paper", lr_update=update)
    steps = 2 * PER_EPOCH
    for step in range(steps):
        assert 0 < rate_at(config, 1e-7, step, PER_EPOCH, steps) <= 1e-7
