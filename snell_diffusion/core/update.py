"""The whole update of one layer, from factors to sparse matrix. SNELLA (arXiv:2510.24037)."""

from collections.abc import Callable

from torch import Tensor

from . import kernels
from .precision import full, no_autocast
from .sparsify import Threshold, sparsify

KERNELS = ("mixed", "distance", "linear")


def update(
    A: Tensor,
    B: Tensor,
    signs: Tensor,
    alpha: Tensor | float | None = None,
    gamma: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    sparsity: float = 0.0,
    *,
    kernel: str = "mixed",
    p: float = 2.0,
    rule: str = "squared",
    threshold: Threshold | None = None,
    reference: Tensor | Callable[[], Tensor] | None = None,
) -> Tensor:
    """Sparse update of one layer, delta = sparsify(w - reference, sparsity).

        kernel     w                                   method with a sparsify rule / with rule none
        mixed      K + alpha softmax_o(K/gamma) + beta SNELLA / MixK
        distance   K = sum_h c_h ||A[h,i] - B[h,o]||_p SNELL / KLoRA
        linear     sum_h c_h A[h] B[h]^T               sparse LoRA / LoRA

    Args:
        A: Input-side factor, [H, I, q].
        B: Output-side factor, [H, O, q].
        signs: Head coefficients, [H].
        alpha, gamma, beta: Scalars of the mixed kernel, and of no other.
        sparsity: Share of zeros, 0 to 1.
        kernel: One of KERNELS.
        p: Order of the norm in the distance and mixed kernels.
        rule: Sparsify rule, one of `sparsify.RULES`.
        threshold: Magnitude to use in place of the quantile, see `sparsify`.
        reference: Constant [I, O], or a function that makes it, subtracted before sparsifying: with
            the initial w the update starts at exactly zero.

    Returns:
        delta, [I, O] float32 (float64 for float64 factors); a Linear takes the transpose.

    Raises:
        ValueError: unknown kernel or rule, scalars missing or not wanted, shapes that do not fit.
    """
    with no_autocast(A.device):
        w = dense(A, B, signs, alpha, gamma, beta, kernel=kernel, p=p)
        if reference is not None:
            w = w - full(reference() if callable(reference) else reference)
        return sparsify(w, sparsity, rule, threshold)


def dense(
    A: Tensor,
    B: Tensor,
    signs: Tensor,
    alpha: Tensor | float | None = None,
    gamma: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    *,
    kernel: str = "mixed",
    p: float = 2.0,
) -> Tensor:
    """w of `update`, before reference and sparsify step, [I, O]. Arguments and errors as there."""
    scalars = {"alpha": alpha, "gamma": gamma, "beta": beta}
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown; known: {', '.join(KERNELS)}")
    if alpha is not None and gamma is not None and beta is not None and kernel == "mixed":
        return kernels.mix(kernels.distance_kernel(A, B, signs, p), alpha, gamma, beta)
    wrong = [n for n, v in scalars.items() if (v is None) == (kernel == "mixed")]
    if wrong:
        verb = "needs" if kernel == "mixed" else "takes no"
        raise ValueError(f"kernel {kernel!r} {verb} {', '.join(wrong)}")
    if kernel == "linear":
        return kernels.linear_kernel(A, B, signs)
    return kernels.distance_kernel(A, B, signs, p)
