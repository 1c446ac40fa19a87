"""Dense update matrices from two sets of points: distance, linear and mixed kernels.

    K[i,o] = sum_h c_h ||A[h,i] - B[h,o]||_p          SNELL (arXiv:2411.01800), KLoRA
    w      = K + alpha softmax_o(K / gamma) + beta    SNELLA (arXiv:2510.24037), MixK

Shapes: H heads, I inputs, O outputs, q columns per head. A [H,I,q], B [H,O,q], signs c [H], K and w
[I,O]. The weight of a Linear is [O,I], so it takes the transpose. Results are float32, or float64
for float64 input, also under autocast.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full, no_autocast

GAMMA_MIN = 1e-4  # smallest temperature used; below it the softmax is a one-hot row anyway
PRODUCT_MIN_COLUMNS = 8  # with fewer columns near-coincident points are common, see _ProductForm


def distance_kernel(A: Tensor, B: Tensor, signs: Tensor, p: float = 2.0) -> Tensor:
    """Signed sum of p-norm distances, K[i,o] = sum_h signs[h] ||A[h,i] - B[h,o]||_p.

    A pair at distance zero has gradient zero. For p = 2 in float32 with at least 8 columns the
    distances come from one matrix product per head; every other case is evaluated directly.

    Args:
        A: Input-side points, [H, I, q].
        B: Output-side points, [H, O, q].
        signs: Head coefficients, [H].
        p: Order of the norm, above 0; `inf` is the largest coordinate.

    Returns:
        [I, O], float32 (float64 for float64 points).

    Raises:
        ValueError: shapes do not fit together, or p is not above 0.
    """
    _check_points(A, B, signs)
    if not p > 0:
        raise ValueError(f"p, the order of the norm, must be above 0, got {p}")
    A, B, signs = full(A), full(B), full(signs)
    with no_autocast(A.device):
        if p == 2 and A.dtype == torch.float32 and A.shape[-1] >= PRODUCT_MIN_COLUMNS:
            K: Tensor = _ProductForm.apply(A, B, signs)
            return K
        d = torch.cdist(A, B, p=p, compute_mode="donot_use_mm_for_euclid_dist")
        return (signs.view(-1, 1, 1) * d).sum(0)


def linear_kernel(A: Tensor, B: Tensor, signs: Tensor) -> Tensor:
    """Signed sum of inner products, K = sum_h signs[h] A[h] B[h]^T: a plain low-rank update.

    Args and returns as `distance_kernel`.
    """
    _check_points(A, B, signs)
    A, B, signs = full(A), full(B), full(signs)
    with no_autocast(A.device):
        return torch.einsum("h,hiq,hoq->io", signs, A, B)


def mix(K: Tensor, alpha: Tensor | float, gamma: Tensor | float, beta: Tensor | float) -> Tensor:
    """Add a softmax over the outputs and an offset: w = K + alpha softmax_o(K / gamma) + beta.

    gamma is used as max(gamma, 1e-4), so zero or a negative value gives neither NaN nor a flipped
    softmax. The gradient passes this bound, so that training can bring gamma back.

    Args:
        K: Kernel matrix, [I, O].
        alpha, gamma, beta: Numbers, or tensors of one element.

    Returns:
        w, [I, O]; a row of the softmax sums to 1 over O.
    """
    K, alpha, gamma, beta = full(K), full(alpha), full(gamma), full(beta)
    with no_autocast(K.device):
        return K + alpha * torch.softmax(K / positive_gamma(gamma), dim=-1) + beta


def positive_gamma(gamma: Tensor | float) -> Tensor | float:
    """The temperature `mix` uses: max(gamma, GAMMA_MIN), its gradient that of gamma itself."""
    if not isinstance(gamma, Tensor):
        return max(gamma, GAMMA_MIN)
    if not torch.is_grad_enabled():
        return gamma.clamp_min(GAMMA_MIN)
    return torch.where(gamma > GAMMA_MIN, gamma, gamma - gamma.detach() + GAMMA_MIN)


def _check_points(A: Tensor, B: Tensor, signs: Tensor) -> None:
    fits = A.ndim == B.ndim == 3 and A.shape[0] == B.shape[0] and A.shape[2] == B.shape[2]
    if not fits or signs.shape != A.shape[:1]:
        raise ValueError(
            "expected A [H, I, q], B [H, O, q] and signs [H], "
            f"got {list(A.shape)}, {list(B.shape)} and {list(signs.shape)}"
        )


class _ProductForm(torch.autograd.Function):
    """Euclidean `distance_kernel` through matrix products, float32.

        |a - b|^2 = [a, |a|^2, 1] . [-2b, 1, |b|^2]
        dL/dA[h,i] = sum_o R (A - B),  R = c_h G / d,  R = 0 where d = 0

    The product cannot resolve |a - b|^2 below about eps (|a|^2 + |b|^2). What is smaller counts as
    zero: coincident points come out at exactly zero, and no gradient is built on noise.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, signs: Tensor) -> Tensor:
        d = [_distances(a, b) for a, b in _centred(A, B)]
        ctx.save_for_backward(A, B, signs, *d)
        K = signs[0] * d[0]
        for h in range(1, len(d)):
            # Rounded before it is added: fused, two equal heads of opposite sign leave 1e-9, not 0.
            K += d[h] * signs[h]
        return K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        A, B, signs, *d = ctx.saved_tensors
        gA, gB = torch.empty_like(A), torch.empty_like(B)
        with no_autocast(G.device):
            for h, (a, b) in enumerate(_centred(A, B)):
                inverse = d[h] / (d[h] * d[h]).add_(torch.finfo(d[h].dtype).tiny)  # 0 where d = 0
                R = (G * signs[h]).mul_(inverse).to(a.dtype)
                gA[h] = a * R.sum(1, keepdim=True) - R @ b
                gB[h] = b * R.sum(0).unsqueeze(1) - R.T @ a
        gsigns = torch.stack([(G * d_h).sum() for d_h in d]) if ctx.needs_input_grad[2] else None
        return gA, gB, gsigns


def _centred(A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each head's points moved to the mean of B, which keeps distances and saves digits.

    On CUDA in float64: the products would otherwise run in TF32 where the user allows it.
    """
    dtype = torch.float64 if A.is_cuda else torch.float32
    mean = B.mean(1, keepdim=True)
    return list(zip((A - mean).to(dtype), (B - mean).to(dtype), strict=True))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_o|, [I, O] float32, from one product; a [I, q], b [O, q]."""
    a_norm = (a * a).sum(1, keepdim=True)
    b_norm = (b * b).sum(1, keepdim=True)
    left = torch.cat([a, a_norm, torch.ones_like(a_norm)], 1)
    right = torch.cat([-2 * b, torch.ones_like(b_norm), b_norm], 1)
    squared = left @ right.T
    noise = (a_norm + b_norm.T).mul_(torch.finfo(a.dtype).eps * left.shape[1])
    return squared.mul_(squared.clone().gt_(noise)).sqrt_().float()
