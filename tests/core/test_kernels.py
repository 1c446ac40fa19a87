import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snell_diffusion.core import (
    GAMMA_MIN,
    distance_kernel,
    kernels,
    linear_kernel,
    mix,
    positive_gamma,
)

SMALL = settings(derandomize=True, max_examples=40, deadline=None)
ORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, math.inf]


def points(
    H: int, I: int, O: int, q: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    A = torch.randn(H, I, q, generator=rng, dtype=torch.float64)
    B = torch.randn(H, O, q, generator=rng, dtype=torch.float64)
    signs = 0.1 * (-1.0) ** torch.arange(H, dtype=torch.float64)
    return A.to(dtype), B.to(dtype), signs.to(dtype)


def by_definition(A: Tensor, B: Tensor, signs: Tensor, p: float) -> Tensor:
    gap = (A.unsqueeze(2) - B.unsqueeze(1)).abs()
    d = gap.amax(-1) if math.isinf(p) else gap.pow(p).sum(-1).pow(1 / p)
    return torch.einsum("h,hio->io", signs, d)


@SMALL
@given(
    H=st.integers(1, 4),
    I=st.integers(1, 7),
    O=st.integers(1, 7),
    q=st.integers(1, 20),
    p=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
)
def test_distance_kernel_follows_its_definition(
    H: int, I: int, O: int, q: int, p: float, seed: int
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        A, B, signs = (t.requires_grad_() for t in points(H, I, O, q, seed, dtype))
        G = torch.randn(I, O, generator=torch.Generator().manual_seed(seed)).to(dtype)
        K = distance_kernel(A, B, signs, p)
        got = torch.autograd.grad(K, [A, B, signs], G)
        wide = [t.detach().double().requires_grad_() for t in (A, B, signs)]
        want = by_definition(*wide, p)
        expected = torch.autograd.grad(want, wide, G.double())
        assert K.dtype == dtype
        for a, b in zip((K, *got), (want, *expected), strict=True):
            scale = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("q", [1, 4, 16])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_points_have_distance_and_gradient_zero(
    q: int, p: float, dtype: torch.dtype
) -> None:
    A, B, signs = points(2, 5, 5, q, dtype=dtype)
    A[:, 3] = B[:, 2]
    A.requires_grad_()
    B.requires_grad_()
    for h in range(2):
        one = distance_kernel(A[h : h + 1], B[h : h + 1], signs[h : h + 1], p)
        assert one[3, 2] == 0
    only = torch.zeros(5, 5, dtype=dtype)
    only[3, 2] = 1.0
    gA, gB = torch.autograd.grad(distance_kernel(A, B, signs, p), [A, B], only)
    assert not gA.any()
    assert not gB.any()


def test_product_form_keeps_float32_accuracy_far_from_the_origin() -> None:
    A, B, signs = points(2, 30, 40, 16, dtype=torch.float32)
    A, B = A + 50, B + 50
    K = distance_kernel(A, B, signs)
    want = by_definition(A.double(), B.double(), signs.double(), 2)
    assert float((K - want).abs().max()) < 2e-6 * float(want.abs().max())


def test_product_form_in_float64_is_what_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    A, B, signs = points(2, 6, 5, 16, dtype=torch.float32)
    A[:, 1] = B[:, 1]
    A.requires_grad_()
    G = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    K = distance_kernel(A, B, signs)
    (gA,) = torch.autograd.grad(K, A, G)
    wide = lambda A, B: list(zip(A.double(), B.double(), strict=True))  # noqa: E731
    monkeypatch.setattr(kernels, "_centred", wide)
    K64 = distance_kernel(A, B, signs)
    (gA64,) = torch.autograd.grad(K64, A, G)
    assert K64.dtype == gA64.dtype == torch.float32
    torch.testing.assert_close(K, K64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gA, gA64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [distance_kernel, linear_kernel])
@pytest.mark.parametrize("q", [4, 16])
def test_kernels_run_in_float32_for_16_bit_points_and_under_autocast(kernel, q: int) -> None:
    low = points(2, 6, 5, q, dtype=torch.bfloat16)
    full = [t.float() for t in low]
    want = kernel(*full)
    assert want.dtype == torch.float32
    assert torch.equal(kernel(*low), want)
    leaf = full[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(kernel(leaf, *full[1:]).square().sum(), leaf)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel(leaf, *full[1:])
    (low_grad,) = torch.autograd.grad(got.square().sum(), leaf)
    assert torch.equal(got, want)
    assert torch.equal(low_grad, grad)


def test_moving_both_point_sets_together_changes_nothing() -> None:
    A, B, signs = points(3, 5, 6, 10)
    moved = distance_kernel(A + 2.5, B + 2.5, signs)
    torch.testing.assert_close(moved, distance_kernel(A, B, signs), rtol=0, atol=1e-13)


def test_linear_kernel_is_the_signed_sum_of_products() -> None:
    A, B, signs = points(3, 5, 6, 4)
    want = sum(signs[h] * A[h] @ B[h].T for h in range(3))
    torch.testing.assert_close(linear_kernel(A, B, signs), want)


def test_mix_adds_a_softmax_over_the_outputs() -> None:
    K = distance_kernel(*points(2, 5, 6, 4))
    w = mix(K, 2.0, 0.5, 0.25)
    soft = (w - K - 0.25) / 2
    torch.testing.assert_close(soft.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(soft[:, 0] / soft[:, 1], ((K[:, 0] - K[:, 1]) / 0.5).exp())


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, GAMMA_MIN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_is_kept_positive_and_keeps_its_gradient(value: float, dtype: torch.dtype) -> None:
    K = distance_kernel(*points(2, 5, 6, 4, dtype=dtype)).requires_grad_()
    gamma = torch.tensor([value], dtype=dtype, requires_grad=True)
    w = mix(K, 1.0, gamma, 0.0)
    assert torch.equal((w - K).argmax(1), K.argmax(1))  # not flipped
    torch.testing.assert_close(w, mix(K, 1.0, GAMMA_MIN, 0.0))
    grads = torch.autograd.grad(w.square().sum(), [K, gamma])
    assert all(g.isfinite().all() for g in grads)
    (through,) = torch.autograd.grad(positive_gamma(gamma).sum(), gamma)
    assert through == 1
    assert positive_gamma(value) == pytest.approx(GAMMA_MIN)


def test_positive_gamma_leaves_larger_values_alone() -> None:
    gamma = torch.tensor([0.35])
    assert torch.equal(positive_gamma(gamma), gamma)
    assert positive_gamma(0.35) == 0.35
    assert positive_gamma(torch.tensor([math.nan])).isnan()


@pytest.mark.parametrize("kernel", [distance_kernel, linear_kernel])
def test_shapes_that_do_not_fit_are_named(kernel) -> None:
    A, B, signs = points(2, 5, 6, 4)
    with pytest.raises(ValueError, match=r"A \[H, I, q\].* got \[2, 5, 4\], \[2, 6, 3\] and \[2\]"):
        kernel(A, B[:, :, :3], signs)
    with pytest.raises(ValueError, match=r"signs \[H\], got .* and \[3\]"):
        kernel(A, B, torch.ones(3))


@pytest.mark.parametrize("p", [0.0, -1.0, math.nan])
def test_order_of_the_norm_must_be_positive(p: float) -> None:
    with pytest.raises(ValueError, match="order of the norm, must be above 0, got"):
        distance_kernel(*points(2, 5, 6, 4), p)
