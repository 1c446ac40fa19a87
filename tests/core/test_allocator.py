import json
import logging
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snell_diffusion.core import Allocator, kept_count

SMALL = settings(derandomize=True, max_examples=60, deadline=None)
SIZES = {"q": 144, "k": 240, "v": 400}


def allocator(sizes: dict[str, int] = SIZES, **changes: Any) -> Allocator:
    settings = {
        "init_sparsity": 0.0,
        "target_sparsity": 0.8,
        "init_warmup": 0,
        "final_warmup": 0,
        "interval": 1,
        "total": 10,
    }
    return Allocator(sizes, **{**settings, **changes})


def observe(alloc: Allocator, strength: dict[str, float], steps: int = 1) -> None:
    for _ in range(steps):
        for name, s in strength.items():
            alloc.observe(name, *observation(s))


def observation(strength: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ones = torch.ones(2, 3, 4)
    return ones, ones * strength, ones, ones * strength


@SMALL
@given(
    sizes=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 500), min_size=1),
    init=st.floats(0, 1),
    target=st.floats(0, 1),
    data=st.data(),
)
def test_levels_keep_the_budget_exactly(
    sizes: dict[str, int], init: float, target: float, data: st.DataObject
) -> None:
    alloc = allocator(sizes, init_sparsity=init, target_sparsity=target, final_warmup=3)
    assert sum(alloc.keep().values()) == math.floor(alloc.budget(0))
    observe(alloc, {name: data.draw(st.floats(1e-3, 1e3)) for name in sizes}, steps=2)
    for step in range(1, 12):
        levels = alloc.update(step)
        keep = alloc.keep()
        assert levels is not None
        assert list(levels) == list(sizes)
        assert sum(keep.values()) == math.floor(alloc.budget(step))
        for name, size in sizes.items():
            assert round((1 - levels[name]) * size) == keep[name]
            assert kept_count(size, levels[name]) == min(keep[name], size - 1)


# Schedule


def test_one_layer_follows_the_budget() -> None:
    alloc = allocator({"only": 100})
    observe(alloc, {"only": 1e-6})
    assert alloc.update(5) == {"only": 1 - alloc.budget(5) / 100}
    assert alloc.scores() == {"only": 1.0}


def test_denser_targets_work_too() -> None:
    alloc = allocator(init_sparsity=0.9, target_sparsity=0.1)
    budgets = [alloc.budget(step) for step in range(11)]
    assert budgets == sorted(budgets)
    assert budgets[0] == pytest.approx(78.4)


def test_warmups_and_interval() -> None:
    alloc = allocator(init_warmup=2, final_warmup=2, interval=3, total=10)
    observe(alloc, dict.fromkeys(SIZES, 1.0))
    moved = [step for step in range(12) if alloc.update(step) is not None]
    assert moved == [3, 6, 9, 10, 11]


def test_before_anything_is_observed_levels_stay() -> None:
    alloc = allocator()
    keep = alloc.keep()
    assert alloc.update(3) is None
    assert alloc.keep() == keep
    assert all(math.isnan(score) for score in alloc.scores().values())


def test_overlapping_warmups_jump_and_strict_refuses_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        alloc = allocator(init_warmup=10, final_warmup=400, interval=20, total=100)
    assert "must exceed init_warmup + final_warmup, got 100 steps for 10 + 400" in caplog.text
    assert alloc.budget(10) == 784
    assert alloc.budget(11) == pytest.approx(156.8)
    with pytest.raises(ValueError, match="total must exceed init_warmup \\+ final_warmup, got 10"):
        allocator(init_warmup=5, final_warmup=5, strict=True)


# What is observed


def test_importance_is_smoothed_sensitivity_and_uncertainty() -> None:
    alloc = allocator({"a": 10}, beta1=0.5, beta2=0.75)
    alloc.observe("a", torch.tensor([2.0]), torch.tensor([-3.0]), None, None)
    state = alloc.state_dict()
    assert (state["I.A.a"], state["U.A.a"]) == (3.0, 0.75)
    alloc.observe("a", torch.tensor([1.0]), torch.tensor([1.0]), None, None)
    state = alloc.state_dict()
    assert (state["I.A.a"], state["U.A.a"]) == (2.0, 0.8125)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [1, 3])
def test_a_non_finite_gradient_skips_the_layer_for_that_step(bad: float, side: int) -> None:
    alloc = allocator()
    observe(alloc, {"q": 1.0, "k": 2.0, "v": 3.0}, steps=2)
    before = {k: v.clone() for k, v in alloc.state_dict().items() if isinstance(v, Tensor)}
    broken = [t.clone() for t in observation(5.0)]
    broken[side][0, 1, 2] = bad
    alloc.observe("k", *broken)
    after = alloc.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    levels = alloc.update(5)
    assert levels is not None
    assert all(0 <= level < 1 for level in levels.values())


def test_an_overflowing_first_step_leaves_no_trace() -> None:
    alloc = allocator()
    ones = torch.ones(2, 3, 4)
    for name in SIZES:
        alloc.observe(name, ones * 1e30, ones * 1e30, ones, ones)  # the product overflows
    assert alloc.update(5) is None
    observe(alloc, dict.fromkeys(SIZES, 1.0))
    assert alloc.update(6) is not None


def test_missing_gradients_are_skipped_one_by_one() -> None:
    alloc = allocator()
    ones = torch.ones(2, 3, 4)
    alloc.observe("q", ones, None, ones, None)
    assert not any(isinstance(v, Tensor) for v in alloc.state_dict().values())
    alloc.observe("q", ones, None, ones, ones)
    assert {k for k, v in alloc.state_dict().items() if isinstance(v, Tensor)} == {"I.B.q", "U.B.q"}


def test_weak_signals_do_not_underflow() -> None:
    alloc = allocator()
    observe(alloc, {"q": 1e-25, "k": 2e-25, "v": 1e-25})  # products of 1e-50 vanish in float32
    assert alloc.update(9) is not None
    assert alloc.scores() == pytest.approx({"q": 1 / 6, "k": 4 / 6, "v": 1 / 6})


def test_16_bit_factors_are_scored_in_float32() -> None:
    alloc = allocator()
    alloc.observe("q", *(t.half() * 1e-4 for t in observation(1.0)))  # float16 rounds 1e-8 to 0
    I = alloc.state_dict()["I.A.q"]
    assert I.dtype == torch.float32
    torch.testing.assert_close(I, torch.full((2, 3, 4), 0.15e-8), rtol=1e-2, atol=0)


def test_metric_mag_needs_no_gradient() -> None:
    alloc = allocator(metric="mag")
    for name, size in (("q", 1.0), ("k", 2.0), ("v", 3.0)):
        alloc.observe(name, torch.full((2, 3, 4), size), None, torch.full((2, 5, 4), size), None)
    alloc.update(9)
    assert alloc.scores() == pytest.approx({"q": 1 / 14, "k": 4 / 14, "v": 9 / 14})


def test_metric_w_mag_is_the_mean_over_kept_entries() -> None:
    alloc = allocator(metric="w_mag")
    deltas = {"q": [1.0, 0.0, -3.0, 0.0], "k": [2.0, 2.0, 2.0, 2.0], "v": [0.0, 0.0, 0.0, 0.0]}
    for name, entries in deltas.items():
        alloc.observe(name, None, None, None, None, delta=torch.tensor(entries))
    alloc.observe("k", None, None, None, None, delta=torch.tensor([math.nan, 1.0]))
    assert alloc.update(9) is not None
    assert alloc.scores() == {"q": 0.5, "k": 0.5, "v": 0.0}
    with pytest.raises(ValueError, match="metric 'w_mag' needs the update of layer 'q', got delta"):
        alloc.observe("q", *observation(1.0))


def test_order_of_layers_does_not_matter() -> None:
    backwards = dict(reversed(SIZES.items()))
    first, second = allocator(SIZES), allocator(backwards)
    strength = {"q": 0.1, "k": 0.1, "v": 0.1}
    observe(first, strength)
    observe(second, dict(reversed(strength.items())))
    for step in range(1, 11):
        assert first.update(step) == second.update(step)


# State


def test_state_is_plain_and_continues_exactly() -> None:
    whole, part = allocator(), allocator()
    strength = {"q": 1.0, "k": 0.2, "v": 0.5}
    for alloc in (whole, part):
        observe(alloc, strength, steps=3)
        alloc.update(4)
    state = part.state_dict()
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    numbers = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    assert all(isinstance(v, int | float | str) for v in numbers.values())
    reread = json.loads(json.dumps(numbers, allow_nan=False))
    resumed = allocator()
    # A file holds its tensors in an order of its own.
    resumed.load_state_dict({**reread, **{k: tensors[k].clone() for k in sorted(tensors)}})
    assert resumed.keep() == whole.keep()
    assert resumed.scores() == whole.scores()
    for alloc in (whole, resumed):
        observe(alloc, {"q": 0.3, "k": 0.9, "v": 0.1}, steps=2)
    assert resumed.update(7) == whole.update(7)


def test_layers_observed_together_are_as_observed_one_by_one() -> None:
    one, together = allocator(), allocator()
    for step in range(3):
        factors = {name: observation(1.0 + step) for name in SIZES}
        if step == 1:  # overflowed: this layer is skipped, the others are not
            factors["q"][1][0] = torch.inf
            assert not factors["k"][1].isinf().any()
        for name, pair in factors.items():
            one.observe(name, *pair)
        together.observe_all(factors)
    state, other = one.state_dict(), together.state_dict()
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
    assert one.update(5) == together.update(5)


def test_a_fresh_state_and_one_of_w_mag_load() -> None:
    fresh = allocator()
    fresh.load_state_dict(json.loads(json.dumps(allocator().state_dict(), allow_nan=False)))
    assert fresh.keep() == allocator().keep()
    alloc, other = allocator(metric="w_mag"), allocator(metric="w_mag")
    for name in SIZES:
        alloc.observe(name, None, None, None, None, delta=torch.ones(3))
    other.load_state_dict(alloc.state_dict())
    assert other.update(5) == alloc.update(5)


def test_a_state_of_other_layers_is_refused() -> None:
    state = allocator().state_dict()
    with pytest.raises(ValueError, match=r"metric 'ipt' and 3 layers.*they differ in \['v'\]"):
        allocator({**SIZES, "v": 7}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has metric 'ipt' and 3 layers, this one 'mag' and 3"):
        allocator(metric="mag").load_state_dict(state)


# Errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sizes": {}}, "sizes needs at least one layer of at least one entry, got {}"),
        ({"sizes": {"a": 0}}, "sizes needs at least one layer of at least one entry, got {'a': 0}"),
        ({"init_sparsity": -0.1}, "init_sparsity must be 0 to 1, got -0.1"),
        ({"target_sparsity": 1.5}, "target_sparsity must be 0 to 1, got 1.5"),
        ({"target_sparsity": math.nan}, "target_sparsity must be 0 to 1, got nan"),
        ({"beta1": 1.0}, "beta1 must be 0 to below 1, got 1.0"),
        ({"beta2": -0.5}, "beta2 must be 0 to below 1, got -0.5"),
        ({"init_warmup": -1}, "init_warmup must be at least 0, got -1"),
        ({"final_warmup": -1}, "final_warmup must be at least 0, got -1"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"total": 0}, "total must be at least 1, got 0"),
        ({"metric": "grad"}, "metric 'grad' is unknown; known: ipt, mag, w_mag"),
    ],
)
def test_arguments_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        allocator(**changes)


def test_unknown_layers_and_changed_shapes_are_named() -> None:
    alloc = allocator()
    with pytest.raises(KeyError, match="layer 'out' is unknown; known: q, k, v"):
        alloc.observe("out", *observation(1.0))
    alloc.observe("q", *observation(1.0))
    with pytest.raises(ValueError, match=r"A\.q was observed as \[2, 3, 4\], now as \[3, 4\]"):
        alloc.observe("q", *(t[0] for t in observation(1.0)))
