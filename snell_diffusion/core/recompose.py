"""Adapters on normalised inputs that share one projection: ARC (arXiv:2310.06234).

    h' = h + ((h U) s) U^T + b        and merged into a linear:  W' = W (I + U Diag(s) U^T),
                                                                 bias' = bias + W b

Shape legend: D width of h, r rank; U [D, r], s [r] or [1, r], b [D], W [O, D].
"""

import torch.nn.functional as F
from torch import Tensor

from .precision import full


def recompose(h: Tensor, U: Tensor, s: Tensor, b: Tensor, dropout: float = 0.0) -> Tensor:
    """What is added to h, ((h U) s) U^T + b, [..., D].

    Args:
        h: Input, [..., D].
        U: Projection, [D, r]; the way back is its transpose.
        s: Rescaling of the code, [r] or [1, r].
        b: Bias, [D].
        dropout: Share of the code's numbers dropped, 0 to 1; pass 0 outside of training.
    """
    code = (h @ U) * s
    if dropout:
        code = F.dropout(code, dropout)
    return code @ U.T + b


def recomposed_weight(W: Tensor, U: Tensor, s: Tensor) -> Tensor:
    """The change of a linear's weight that has the same effect, W U Diag(s) U^T, [O, D]."""
    W, U = full(W), full(U)
    return ((W @ U) * full(s)) @ U.T


def recomposed_bias(W: Tensor, b: Tensor) -> Tensor:
    """The change of its bias, W b, [O]."""
    return full(W) @ full(b)
