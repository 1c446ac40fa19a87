"""The forward passes: values, thresholds, merged weights. `test_passes.py` runs this file."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from snell_diffusion.core import RULES, mix, sparsify, threshold, update
from snell_diffusion.core.triton import fused, launch, ops, passes, selection
from tests.core.test_golden import SETTINGS, parameters
from tests.core.triton.layers import (
    DEVICE,
    KERNELS,
    Layers,
    cut_at,
    layers,
    levels_of,
    quantile,
    values,
)
from tests.golden.cases import Case, cases

LEVELS = (0.0, 0.3, 0.5, 0.9, 0.987, 1.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "G, H, I, O, q",
    [
        (1, 1, 1, 1, 1),
        (3, 2, 37, 53, 16),
        (1, 2, 40, 200, 3),
        (1, 3, 20, 33, 33),
        (1, 8, 20, 33, 8),
    ],
)
def test_values_are_those_of_the_plain_formula(kernel, G, H, I, O, q):
    given = layers(G, H, I, O, q, kernel)
    w = values(given.group())
    for g in range(G):
        exact = given.w(g)
        largest = float(exact.abs().max())
        torch.testing.assert_close(w[g].double(), exact, rtol=0, atol=1e-6 * largest)
        torch.testing.assert_close(w[g], given.w(g, torch.float32), rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("value", [5.0, 1e-3, 1e-9, -2.0])
def test_row_statistics_at_any_temperature(value):
    given = layers(2, 2, 20, 130, 8, "mixed")
    alpha, gamma, beta = given.mixers
    given.mixers = alpha, torch.full_like(gamma, value), beta
    group = given.group()
    w = values(group)
    for g in range(2):
        K = Layers(given.A, given.B, given.signs, ()).w(g)
        want = mix(K.T, *(m[g].double() for m in given.mixers)).T
        used = max(value, 1e-4)
        torch.testing.assert_close(
            group.lse[g].double(), (K / used).logsumexp(0), rtol=1e-6, atol=1e-5
        )
        torch.testing.assert_close(
            w[g].double(), want, rtol=1e-3 if used < 1e-2 else 1e-5, atol=1e-5
        )


def test_row_statistics_may_be_given():
    given = layers(2, 2, 37, 53, 8, "mixed")
    first = given.group()
    again = given.group(first.lse)
    assert again.lse is first.lse
    assert torch.equal(values(again), values(first))
    moved = given.group(first.lse + 1)
    assert not torch.equal(values(moved), values(first))


@pytest.mark.parametrize("q", [4, 16])
def test_coincident_points_are_at_distance_zero(q):
    given = layers(1, 1, 37, 53, q, "distance")
    given.A[0, 0] = given.B[0, 0, :37]
    w = values(given.group())[0]
    assert not w.diagonal().any()
    assert int((w == 0).sum()) == 37


def test_equal_heads_of_opposite_sign_cancel_exactly():
    given = layers(1, 2, 37, 53, 16, "distance")
    given.A[:, 1], given.B[:, 1] = given.A[:, 0], given.B[:, 0]
    assert not values(given.group()).any()


def test_points_far_from_the_origin_keep_their_accuracy():
    given = layers(1, 2, 37, 53, 16, "distance")
    given.A += 50
    given.B += 50
    w, exact = values(given.group())[0], given.w(0)
    assert float((w - exact).abs().max()) < 2e-6 * float(exact.abs().max()) + 1e-6


def test_row_statistics_in_parts(monkeypatch):
    given = layers(1, 2, 40, 150, 8, "mixed")
    monkeypatch.setattr(launch, "PROGRAMS_A_PROCESSOR", 0)
    whole = given.group()
    assert whole.strips("I") == (1, 1, 192)
    monkeypatch.setattr(launch, "PROGRAMS_A_PROCESSOR", 100)
    parts = given.group()
    assert parts.strips("I") == (1, 3, 64)
    torch.testing.assert_close(parts.lse, whole.lse, rtol=1e-6, atol=1e-6)


# Thresholds


def check_thresholds(given: Layers, levels: Tensor) -> None:
    group = given.group()
    w = values(group)
    t, is_zero = ops.thresholds(group, levels)
    want = torch.stack([quantile(w[g], float(levels[g])) for g in range(group.G)])
    assert torch.equal(t, want), (t, want)
    assert torch.equal(t, torch.stack([threshold(w[g], levels[g]) for g in range(group.G)]))
    assert is_zero.tolist() == [float(not w[g].any()) for g in range(group.G)]


def same(given: Layers, times: int) -> Layers:
    """The first layer, several times over: one for each level to try."""
    A, B, signs, *mixers = (
        t[:1].expand(times, *t.shape[1:]).contiguous()
        for t in (given.A, given.B, given.signs, *given.mixers)
    )
    return Layers(A, B, signs, tuple(mixers))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "I, O, q, levels",
    [(37, 53, 16, LEVELS), (40, 70, 5, (0.3, 0.9)), (1, 1, 8, LEVELS), (1, 2, 8, LEVELS)],
)
def test_thresholds_are_exact(kernel, I, O, q, levels):
    check_thresholds(same(layers(1, 2, I, O, q, kernel), len(levels)), levels_of(*levels))


def test_thresholds_of_different_layers_and_levels_in_one_launch():
    given = layers(3, 2, 37, 53, 16, "mixed")
    given.A[1] *= 1e-3
    given.B[2] *= 1e4
    check_thresholds(given, levels_of(0.9, 0.2, 0.55))


def test_thresholds_among_ties():
    given = layers(1, 1, 40, 48, 16, "distance")
    given.A[:, :, 8:] = given.A[:, :, :8].repeat(1, 1, 4, 1)
    given.B[:, :, 6:] = given.B[:, :, :6].repeat(1, 1, 7, 1)  # 48 values, each 40 times
    check_thresholds(same(given, len(LEVELS)), levels_of(*LEVELS))
    given.A[:] = given.B[:, :, :1]
    check_thresholds(same(given, len(LEVELS)), levels_of(*LEVELS))


def test_thresholds_of_a_matrix_of_zeros():
    given = layers(2, 2, 37, 53, 16, "distance")
    given.A[0, 1], given.B[0, 1] = given.A[0, 0], given.B[0, 0]
    check_thresholds(given, levels_of(0.9, 0.9))
    t, is_zero = ops.thresholds(given.group(), levels_of(0.9, 0.9))
    assert t[0] == 0 < t[1]
    assert is_zero.tolist() == [1.0, 0.0]


def test_nan_counts_as_the_largest_magnitude():
    given = layers(2, 1, 20, 30, 8, "distance")
    given.A[0, 0, 4] = torch.nan  # 30 of 600 entries
    t, is_zero = ops.thresholds(given.group(), levels_of(0.9, 0.9))
    w = values(given.group())
    assert int(w[0].isnan().sum()) == 30
    assert t[0] == quantile(w[0], 0.9)
    assert not is_zero.any()


@pytest.fixture
def small_sample(monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE_FROM", 0)
    monkeypatch.setattr(selection, "SAMPLE_TILES", 8)


def counts(monkeypatch) -> list[int]:
    """How many layers each count found unfinished."""
    unfinished = []

    def watched(kernel, grid, device, *args, **meta):
        if kernel is passes.count:
            unfinished.append(int((args[2].done == 0).sum()))
        launch.launch(kernel, grid, device, *args, **meta)

    monkeypatch.setattr(selection, "launch", watched)
    return unfinished


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_spares_counts_and_changes_nothing(kernel, monkeypatch, small_sample):
    unfinished = counts(monkeypatch)
    check_thresholds(same(layers(1, 2, 64, 80, 16, kernel), 4), levels_of(0.3, 0.5, 0.7, 0.9))
    assert unfinished == [4, 4, 0, 0]


def test_counts_in_parts_add_up(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS_A_PROCESSOR", 100)
    check_thresholds(layers(1, 2, 37, 150, 16, "mixed"), levels_of(0.9))


@pytest.mark.parametrize("guess", [0, 0x3F800000, int(passes.LAST.value)])
def test_a_misleading_sample_changes_nothing(guess, monkeypatch, small_sample):
    monkeypatch.setattr(
        selection,
        "_sample",
        lambda group: torch.full((group.G, 2048), guess, dtype=torch.int32, device=group.device),
    )
    unfinished = counts(monkeypatch)
    check_thresholds(same(layers(1, 2, 37, 53, 16, "mixed"), len(LEVELS)), levels_of(*LEVELS))
    assert len(unfinished) == selection.COUNTS
    assert unfinished[-1] > 0  # without the last count some threshold would be missing


def test_a_matrix_that_is_large_enough_is_sampled(monkeypatch):
    sampled = []
    monkeypatch.setattr(
        selection, "_sample", lambda group, real=selection._sample: sampled.append(1) or real(group)
    )
    check_thresholds(layers(1, 1, 260, 256, 8, "distance"), levels_of(0.9))
    assert sampled == [1]


# Merged weights


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the device rounds; Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        return (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    return x.to(dtype)


@pytest.mark.parametrize(
    "rule, kernel", [*((rule, "mixed") for rule in RULES), ("squared", "distance")]
)
def test_merged_weights_are_the_sum_rounded_once(rule, kernel):
    given = layers(2, 2, 37, 53, 16, kernel)
    group = given.group()
    w, cut = values(group), cut_at(group, 0.7, rule)
    scale = torch.tensor([0.7, -1.3], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        W0 = torch.randn(2, 53, 37, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        out = torch.full_like(W0, torch.nan)
        ops.write(group, cut, scale, list(W0), list(out), rule)
        for g in range(2):
            delta = sparsify(w[g], 0.0, rule, None if cut is None else cut[0][g])
            want = rounded(delta * scale[g] + W0[g].float(), dtype)
            assert torch.equal(out[g], want), (dtype, rule)
        kept = out.clone()
        ops.write(group, cut, scale, list(W0), list(W0), rule)  # in place
        assert torch.equal(W0, kept)


def test_matrices_may_be_columns_of_wider_ones():
    group = layers(1, 2, 37, 53, 16, "mixed").group()
    cut = cut_at(group, 0.7, "squared")
    W0 = torch.randn(53, 90, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out, want = torch.zeros_like(W0), torch.empty(53, 37, device=DEVICE)
    ops.write(group, cut, 1.0, [W0[:, 8:45]], [out[:, 40:77]])
    ops.write(group, cut, 1.0, [W0[:, 8:45].contiguous()], [want])
    assert torch.equal(out[:, 40:77], want)
    assert not out[:, :40].any()
    assert not out[:, 77:].any()
    for a, b in zip(
        ops.backward(group, cut, 1.0, [W0[:, 8:45]]),
        ops.backward(group, cut, 1.0, [W0[:, 8:45].contiguous()]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_update_alone_may_be_written_in_16_bit():
    group = layers(1, 2, 37, 53, 16, "mixed").group()
    cut = cut_at(group, 0.7, "squared")
    full, low = torch.empty(53, 37, device=DEVICE), torch.empty(53, 37, device=DEVICE).bfloat16()
    ops.write(group, cut, 2.0, None, [full])
    ops.write(group, cut, 2.0, None, [low])
    assert torch.equal(rounded(full, torch.bfloat16), low)
    assert torch.equal(full, 2 * sparsify(values(group)[0], 0.0, threshold=cut[0][0]))


@pytest.mark.parametrize("rule", RULES)
def test_a_matrix_of_zeros_writes_nothing(rule):
    given = layers(1, 2, 20, 30, 16, "distance")
    given.A[:, 1], given.B[:, 1] = given.A[:, 0], given.B[:, 0]
    group = given.group()
    out = torch.full((30, 20), torch.nan, device=DEVICE)
    ops.write(group, cut_at(group, 0.7, rule), 1.0, None, [out], rule)
    assert not out.any()


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_layer_is_not_hidden(rule):
    given = layers(2, 1, 20, 30, 8, "distance")
    cut = cut_at(given.group(), 0.7, rule)
    given.A[0, 0, 4] = torch.nan
    out = torch.zeros(2, 30, 20, device=DEVICE)
    ops.write(given.group(), cut, 1.0, list(torch.zeros_like(out)), list(out), rule)
    assert out[0, :, 4].isnan().all()
    assert int(out.isnan().sum()) == 30


def test_layers_of_a_group_do_not_touch_each_other(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS_A_PROCESSOR", 0)  # parts depend on the group's size
    given = layers(3, 2, 37, 53, 16, "mixed")
    together = torch.empty(3, 53, 37, device=DEVICE)
    group = given.group()
    cut = cut_at(group, 0.7, "squared")
    ops.write(group, cut, 1.0, None, list(together))
    for g in range(3):
        A, B, signs, *mixers = (
            t[g : g + 1] for t in (given.A, given.B, given.signs, *given.mixers)
        )
        alone, single = (
            torch.empty(53, 37, device=DEVICE),
            Layers(A, B, signs, tuple(mixers)).group(),
        )
        ops.write(single, cut_at(single, 0.7, "squared"), 1.0, None, [alone])
        assert torch.equal(alone, together[g])


LAYER_CASES = [case for case in cases("layer") if case.config["p"] == 2]


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_numbers_of_the_public_code(case: Case):
    """Update and factors' gradients of the golden layers; the input's is not their part."""
    t, setting = case.tensors("f32"), SETTINGS[case.method]
    given = [t[n][None] for n in ("A", "B", "coeff")]
    mixers = [t[n] for n in ("alpha", "gamma", "beta")] if setting["kernel"] == "mixed" else []
    A, B, signs, *mixers = (x.contiguous().to(DEVICE) for x in (*given, *mixers))
    group = ops.prepare(A, B, signs, *(mixers or [None] * 3))
    O, I = case.config["out_features"], case.config["in_features"]
    rule = setting["rule"]
    level = levels_of(case.config["sparsity"] or 0.0)
    cut = None if rule == "none" else ops.thresholds(group, level)
    delta = torch.empty(O, I, device=DEVICE)
    ops.write(group, cut, 1.0, None, [delta], rule)
    check = {"y": t["x"].to(DEVICE) @ delta.T}
    if rule == "squared":
        check |= {"delta": delta.T, "threshold": cut[0]}
        assert int(delta.count_nonzero()) == case.config["nonzero_f32"]
    if setting["kernel"] == "mixed":
        check["dense"] = values(group)[0].T
    x, gy = (t[n].reshape(-1, t[n].shape[-1]).to(DEVICE) for n in ("x", "gy"))
    grads = ops.backward(group, cut, 1.0, [(gy.T @ x).contiguous()], rule)
    check |= {f"g{n}": getattr(grads, n) for n in parameters(t, case.method)}
    for name, got in check.items():
        case.assert_close(got.cpu(), t[f"{name}.f32"], "f32", name)


def test_a_launch_that_fails_switches_the_kernels_off(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_failures", [])
    group, out = layers(1, 2, 20, 30, 16, "mixed").group(), torch.empty(30, 20, device=DEVICE)
    monkeypatch.setattr(ops, "passes", SimpleNamespace(write=passes.select))  # other arguments
    plain = []
    for _ in range(2):
        fused.attempt(
            DEVICE,
            lambda: ops.write(group, None, 1.0, None, [out], "none"),
            lambda: plain.append(fused.available(DEVICE)),
        )
    assert plain == [False, False]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "fused GPU kernels are off" in caplog.text
    assert "select: TypeError" in caplog.text


# Arguments


def test_arguments_that_do_not_fit_are_named():
    given = layers(2, 2, 20, 30, 8, "mixed")
    A, B, signs, (alpha, gamma, beta) = given.A, given.B, given.signs, given.mixers
    group = given.group()
    good = list(torch.zeros(2, 30, 20, device=DEVICE))
    cut = cut_at(group, 0.7, "squared")
    for message, call in {
        r"expected A \[G, H, I, q\].*got \[2, 2, 20, 8\], \[2, 2, 30, 7\]": lambda: ops.prepare(
            A, B[..., :7], signs
        ),
        "take float32 factors, got torch.float64": lambda: ops.prepare(A.double(), B, signs),
        "up to 8 heads of up to 64 columns, got 2 of 65": lambda: ops.prepare(
            A.repeat(1, 1, 1, 9)[..., :65], B.repeat(1, 1, 1, 9)[..., :65], signs
        ),
        "needs alpha, gamma and beta": lambda: ops.prepare(A, B, signs, alpha, gamma),
        r"gamma must be 2 float32 numbers, one a layer, got \[1\]": lambda: ops.prepare(
            A, B, signs, alpha, gamma[:1], beta
        ),
        "rule 'hard' is unknown; known: squared": lambda: ops.write(
            group, cut, 1, None, good, "hard"
        ),
        "rule 'mask' needs the thresholds": lambda: ops.write(group, None, 1, None, good, "mask"),
        "out must hold 2 matrices, one a layer, got 1": lambda: ops.write(
            group, cut, 1, None, good[:1]
        ),
        r"levels must be 2 float64 numbers, one a layer, got \[2\] torch.float32": (
            lambda: ops.thresholds(group, torch.ones(2, device=DEVICE))
        ),
        r"weights must be \[30, 20\] matrices with contiguous rows.*got \[20, 30\]": lambda: (
            ops.write(group, cut, 1, [w.reshape(20, 30) for w in good], good)
        ),
        r"weights must be .* with strides \[1, 30\]": lambda: ops.write(
            group, cut, 1, [w.reshape(20, 30).T for w in good], good
        ),
        "out must be .* one layout, .*got .* with strides .40, 1.": lambda: ops.write(
            group, cut, 1, None, [good[0], torch.zeros(30, 40, device=DEVICE)[:, :20]]
        ),
        r"dW must be .* of one 16 or 32 bit float dtype .*torch.float64": lambda: ops.backward(
            group, cut, 1, [w.double() for w in good]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_whole_update_is_that_of_the_plain_function():
    given = layers(1, 2, 37, 53, 16, "mixed")
    group = given.group()
    cut = ops.thresholds(group, levels_of(0.9))
    out = torch.empty(53, 37, device=DEVICE)
    ops.write(group, cut, 1.0, None, [out])
    want = update(*given.one(0, torch.float32), sparsity=0.9).T
    assert int((out != 0).sum()) == int((want != 0).sum())
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))
