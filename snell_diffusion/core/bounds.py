"""How large an update can be, told from its factors alone, without evaluating it.

    |K[i,o]| <= u_i + v_o,   u_i = sum_h |c_h| |A[h,i] - m_h|,   v_o = sum_h |c_h| |B[h,o] - m_h|
    ||w||_n  <= ||u_i + v_o||_n + |alpha| I^(1/n) + |beta| (I O)^(1/n)

by the triangle inequality, for any centre m_h (the mean of B[h]); a row of the softmax sums to 1.
The kernel "linear" has ||K||_n <= sum_h |c_h| ||(|A[h,i]|)||_n ||(|B[h,o]|)||_n. Rules that square
an entry need n = 4, ||w |w| ||_2 = ||w||_4^2, the others n = 2; no rule enlarges what it keeps.
"""

import math

import torch
from torch import Tensor

SQUARING = ("squared", "squared_true", "printed", "printed_true")
LARGEST_POINT = 1e15  # beyond it the squares of an evaluation in float32 come near its range
SLACK = 1.01  # for the rounding of an evaluation and of this bound


def update_bound(
    A: Tensor,
    B: Tensor,
    signs: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    kernel: str,
    p: float,
    rule: str,
) -> float:
    """At least the Frobenius norm of an update at any sparsity level, in a few passes over factors.

    Args:
        A, B, signs: Factors [H, I, q], [H, O, q] and coefficients [H].
        alpha, beta: Scalars of the mixed kernel.
        kernel, p, rule: As in `update.update`.

    Returns:
        The bound; infinite where none is known: other norms than 1 and 2, or values so large that
        an evaluation could overflow.
    """
    A, B, c = A.float(), B.float(), signs.double().abs()
    inputs, outputs = A.shape[1], B.shape[1]
    n = 4 if rule in SQUARING else 2
    if kernel == "linear":
        a, b = _lengths(A, 2.0), _lengths(B, 2.0)
        largest = a.max() * b.max()
        norm = (c * _norm(a, n) * _norm(b, n)).sum()
    elif p in (1.0, 2.0):
        mean = B.mean(1, keepdim=True)
        a, b = _lengths(A - mean, p), _lengths(B - mean, p)
        largest = torch.maximum(a.max(), b.max())
        norm = _sum_norm(c @ a, c @ b, n)
    else:
        return math.inf
    bound = float(norm)
    if alpha is not None and beta is not None:
        bound += abs(float(alpha)) * inputs ** (1 / n)
        bound += abs(float(beta)) * (inputs * outputs) ** (1 / n)
    bound = SLACK * (bound**2 if n == 4 else bound)
    return bound if float(largest) <= LARGEST_POINT and not math.isnan(bound) else math.inf


def _lengths(points: Tensor, p: float) -> Tensor:
    """[H, I, q] to lengths [H, I], float64."""
    return torch.linalg.vector_norm(points, ord=p, dim=-1).double()


def _norm(lengths: Tensor, n: int) -> Tensor:
    return torch.linalg.vector_norm(lengths, ord=n, dim=-1)


def _sum_norm(u: Tensor, v: Tensor, n: int) -> Tensor:
    """The n-norm of all u_i + v_o, from the moments of u [I] and v [O]."""
    moments = [math.comb(n, k) * (u**k).sum() * (v ** (n - k)).sum() for k in range(n + 1)]
    return torch.stack(moments).sum() ** (1 / n)
