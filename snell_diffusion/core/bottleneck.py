"""Small branches beside or behind a linear: up(activation(down(x))).

Shape legend: I in features, O out features, r rank; down [r, I], up [O, r].
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    None: lambda code: code,
}
"""By name; GELU is the exact one. None is LoRA's."""


def bottleneck(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """up dropout(activation(down x + b)) + b_up, [..., O].

    Args:
        x: [..., I], of the parameters' dtype.
        down, up: [r, I] and [O, r].
        down_bias, up_bias: [r] and [O], or none.
        activation: One of ACTIVATIONS.
        dropout: Share of the code's numbers dropped; pass 0 outside of training.

    Raises:
        ValueError: The activation is unknown.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(map(str, ACTIVATIONS))
        raise ValueError(f"activation {activation!r} is unknown; known: {known}")
    code = ACTIVATIONS[activation](F.linear(x, down, down_bias))
    if dropout:
        code = F.dropout(code, dropout)
    return F.linear(code, up, up_bias)
