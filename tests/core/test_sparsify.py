import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snell_diffusion.core import (
    LIVE_AT_ZERO,
    RULES,
    FirstThreshold,
    kept_count,
    sparsify,
    sparsity_for,
    threshold,
)

SMALL = settings(derandomize=True, max_examples=60, deadline=None)
LEVELS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Distinct magnitudes, both signs."""
    rng = torch.Generator().manual_seed(seed)
    size = rows * columns
    magnitudes = (torch.randperm(size, generator=rng) + 1).double() / size
    signs = torch.randint(0, 2, (size,), generator=rng) * 2 - 1
    return (magnitudes * signs).reshape(rows, columns)


@SMALL
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), level=LEVELS, seed=st.integers(0, 99))
def test_distinct_magnitudes_keep_exactly_kept_count(
    rows: int, columns: int, level: float, seed: int
) -> None:
    w = matrix(rows, columns, seed)
    keep = kept_count(w.numel(), level)
    kept = w.abs().flatten().sort(descending=True).values[:keep]
    for rule in set(RULES) - {"none"}:
        delta = sparsify(w, level, rule)
        assert int(delta.count_nonzero()) == keep, rule
        assert torch.equal(w[delta != 0].abs().sort(descending=True).values, kept), rule


@SMALL
@given(size=st.integers(1, 2**40), share=st.floats(0, 1))
def test_a_level_for_a_count_keeps_that_count(size: int, share: float) -> None:
    for keep in {0, min(1, size), size // 2, size - 1, math.floor(share * size), size}:
        level = sparsity_for(size, keep)
        assert 0 <= level <= 1
        assert abs(level - (1 - keep / size)) <= 1 / size
        assert kept_count(size, level) == min(keep, size - 1)


@SMALL
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), level=LEVELS, seed=st.integers(0, 9))
@pytest.mark.parametrize("compiling", [False, True])
def test_threshold_is_the_quantile(
    compiling: bool, rows: int, columns: int, level: float, seed: int
) -> None:
    w = matrix(rows, columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        t = threshold(w, level)
    want = torch.quantile(w.abs().flatten(), level)
    torch.testing.assert_close(t, want, rtol=1e-14, atol=0)
    assert t.shape == ()


def test_threshold_on_other_devices_needs_no_value() -> None:
    t = threshold(torch.empty(5, 6, device="meta"), 0.5)
    assert (t.shape, t.device.type) == ((), "meta")


def test_threshold_leaves_its_input_alone() -> None:
    w = matrix(5, 6)
    before = w.clone()
    threshold(w, 0.5)
    threshold(w.abs().flatten(), 0.5)
    assert torch.equal(w, before)


def test_ties_at_the_threshold_are_dropped() -> None:
    w = torch.tensor([[1.0, -1.0, 2.0, -2.0, 2.0, 3.0]])
    assert sparsify(w, 0.4, "mask").tolist() == [[0, 0, 0, 0, 0, 3]]  # position 2 is a 2
    assert sparsify(w, 0.2, "mask").tolist() == [[0, 0, 2, -2, 2, 3]]  # position 1 is a 1
    for rule in set(RULES) - {"none"}:
        assert not sparsify(torch.full((3, 4), -0.5), 0.0, rule).any()


@SMALL
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), level=LEVELS, seed=st.integers(0, 9))
def test_values_and_gradients_of_every_rule(
    rows: int, columns: int, level: float, seed: int
) -> None:
    w = matrix(rows, columns, seed).requires_grad_()
    G = matrix(rows, columns, seed + 100)
    a, t = w.detach().abs(), threshold(w, level)
    m = (a > t).double()
    above = (a - t).clamp_min(0)
    table = {  # methods of SNELL and SNELLA, by formula: result, derivative
        "squared": (w * a * m, a * m),
        "squared_true": (w * a * m, 2 * a * m),
        "printed": (w * above, above),
        "printed_true": (w * above, (2 * a - t) * m),
        "mask": (w * m, m),
        "soft": (w.sign() * above, m),
    }
    assert set(table) | {"none"} == set(RULES)
    for rule, (value, derivative) in table.items():
        got = sparsify(w, level, rule)
        (grad,) = torch.autograd.grad(got, w, G)
        torch.testing.assert_close(got, value, msg=rule)
        torch.testing.assert_close(grad, G * derivative, msg=rule)


def test_rule_none_returns_the_matrix() -> None:
    w = matrix(3, 4)
    assert sparsify(w, 0.0, "none") is w
    with pytest.raises(ValueError, match=r"'none' drops nothing, so sparsity must be 0, got 0\.5"):
        sparsify(w, 0.5, "none")


@pytest.mark.parametrize("level", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("rule", RULES)
def test_an_all_zero_matrix_can_leave_zero_by_the_rules_that_say_so(
    rule: str, level: float
) -> None:
    level = 0.0 if rule == "none" else level
    w = torch.zeros(4, 5, requires_grad=True)
    delta = sparsify(w, level, rule)
    (grad,) = torch.autograd.grad(delta, w, torch.ones(4, 5))
    assert not delta.any()
    assert bool((grad == 1).all()) == (rule in LIVE_AT_ZERO)
    assert bool(grad.any()) == (rule in LIVE_AT_ZERO)


@pytest.mark.parametrize("rule", RULES)
def test_zeros_in_other_matrices_stay_pruned(rule: str) -> None:
    w = torch.tensor([[0.0, 0.0, 1.0, -2.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(sparsify(w, 0.0, rule), w, torch.ones(1, 4))
    assert bool(grad[:, :2].any()) == (rule == "none")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_matrix_is_not_hidden(rule: str, bad: float) -> None:
    w = matrix(4, 5)
    w[1, 2] = bad
    assert not sparsify(w, 0.0, rule)[1, 2].isfinite()


def test_16_bit_matrices_are_sparsified_in_float32() -> None:
    w = matrix(4, 5).bfloat16()
    for rule in RULES:
        level = 0.0 if rule == "none" else 0.5
        delta = sparsify(w, level, rule)
        assert delta.dtype == torch.float32
        assert torch.equal(delta, sparsify(w.float(), level, rule))
    assert threshold(w, 0.5).dtype == torch.float32
    assert threshold(w.double(), 0.5).dtype == torch.float64


def test_a_given_threshold_replaces_the_quantile() -> None:
    w = matrix(4, 5)
    t = threshold(w, 0.7)
    assert torch.equal(sparsify(w, 0.0, threshold=t), sparsify(w, 0.7))
    assert torch.equal(sparsify(w, 0.0, threshold=lambda w: threshold(w, 0.7)), sparsify(w, 0.7))


def test_first_threshold_is_computed_once() -> None:
    once = FirstThreshold(0.7)
    assert once.value is None
    first = sparsify(matrix(4, 5), 0.7, threshold=once)
    assert torch.equal(first, sparsify(matrix(4, 5), 0.7))
    held = once.value
    sparsify(matrix(4, 5, seed=1), 0.7, threshold=once)
    assert once.value is held


@pytest.mark.full
def test_no_size_limit_and_exact_ranks_beyond_24_bits() -> None:
    size = 2**24 + 101
    w = torch.arange(1, size + 1, dtype=torch.float64)
    keep = 12_345
    assert int((w > threshold(w, sparsity_for(size, keep))).sum()) == keep


@pytest.mark.parametrize("level", [-0.1, 1.1, math.nan])
def test_levels_outside_0_to_1_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match="sparsity, the share of zeros, must be 0 to 1, got"):
        sparsify(matrix(2, 2), level)
    with pytest.raises(ValueError, match="sparsity, the share of zeros, must be 0 to 1, got"):
        kept_count(4, level)


def test_other_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match="rule 'hard' is unknown; known: squared, squared_true"):
        sparsify(matrix(2, 2), 0.5, "hard")
    with pytest.raises(ValueError, match="needs at least one entry, got 0"):
        sparsify(torch.zeros(0, 3), 0.5)
    with pytest.raises(ValueError, match="keep must be 0 to 4, the size of the matrix, got 5"):
        sparsity_for(4, 5)
