"""Randomness is a function of its counters and of nothing else."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snell_diffusion.training.randomness import generator, item_at, normal, seed_for


def test_seed_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"7/noise/3/1").digest()
    assert seed_for(7, "noise", 3, 1) == int.from_bytes(digest[:8], "little") >> 1


def test_every_argument_changes_the_draw() -> None:
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 0)]
    seeds = {seed_for(*key) for key in keys}
    assert len(seeds) == len(keys)


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    first = normal((4,), 0, "noise", 5)
    torch.manual_seed(99)
    torch.randn(1000)
    assert torch.equal(normal((4,), 0, "noise", 5), first)
    assert torch.equal(torch.randn(4, generator=generator(0, "noise", 5)), first)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 30), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_every_epoch_holds_every_item_once(size: int, seed: int, epoch: int) -> None:
    items = [item_at(epoch * size + place, size, seed) for place in range(size)]
    assert sorted(items) == list(range(size))


def test_epochs_have_different_orders() -> None:
    orders = {tuple(item_at(e * 20 + i, 20, 0) for i in range(20)) for e in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("position, size", [(-1, 3), (0, 0)])
def test_bad_position_is_refused(position: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"got size {size}, position {position}"):
        item_at(position, size, 0)
