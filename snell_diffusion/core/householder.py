"""Updates made of two reflections, a diagonal and a few rows: HTA (arXiv:2410.22952).

    Delta = (I - c_l v_l v_l^T) Diag(d) (I - c_r v_r v_r^T) + down up          [I, O]

The paper prints reflections without a factor ("literal", c = 1), which are orthogonal only where
||v||^2 = 2; "unit" takes c = 2 / ||v||^2. For I != O, which the paper leaves open, Diag(d) is a
rectangular diagonal of min(I, O) numbers. No reflection is ever built: Delta is Diag(d) plus a
product of b + 2 columns and rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import full

REFLECTIONS = ("literal", "unit")


def householder_update(
    v_l: Tensor,
    v_r: Tensor,
    d: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    reflection: str = "unit",
) -> Tensor:
    """The dense update, differentiable in everything; O(I O (b + 2)) operations.

    Args:
        v_l: Left vector, [I].
        v_r: Right vector, [O].
        d: Diagonal, [min(I, O)].
        down: Rows added, input side, [I, b]; None for b = 0.
        up: The same, output side, [b, O].
        reflection: "literal" or "unit". A vector of zeros reflects nothing in either.

    Returns:
        Delta [I, O], float32 (float64 for float64); a Linear takes the transpose.

    Raises:
        ValueError: Unknown reflection, or shapes that do not fit.
    """
    left, right = low_rank_part(v_l, v_r, d, down, up, reflection=reflection)
    delta = left @ right
    size = min(delta.shape)
    delta = delta.clone()
    delta.diagonal()[:size] += full(d)
    return delta


def householder_product(
    x: Tensor,
    v_l: Tensor,
    v_r: Tensor,
    d: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    reflection: str = "unit",
) -> Tensor:
    """x Delta for x [..., I] without building Delta: O((I + O) (b + 2)) operations a row.

    Arguments and errors as `householder_update`.
    """
    left, right = low_rank_part(v_l, v_r, d, down, up, reflection=reflection)
    size = len(d)
    on_diagonal = F.pad(x[..., :size] * full(d), (0, right.shape[1] - size))
    return (x @ left) @ right + on_diagonal


def low_rank_part(
    v_l: Tensor,
    v_r: Tensor,
    d: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    reflection: str = "unit",
) -> tuple[Tensor, Tensor]:
    """L [I, b + 2] and R [b + 2, O] with Delta = Diag(d) + L R; arguments as there.

    with p = v_l d and w = d v_r on the diagonal, s = sum of v_l d v_r:
    L R = v_l (c_l c_r s v_r - c_l p) - c_r w v_r + down up
    """
    check_shapes(v_l, v_r, d, down, up, reflection)
    v_l, v_r, d = full(v_l), full(v_r), full(d)
    c_l, c_r = coefficient(v_l, reflection), coefficient(v_r, reflection)
    size = len(d)
    p = v_l[:size] * d
    w = d * v_r[:size]
    s = (v_l[:size] * w).sum()
    row = c_l * (c_r * s * v_r - F.pad(p, (0, len(v_r) - size)))
    left = [v_l, F.pad(w, (0, len(v_l) - size))]
    right = [row, -c_r * v_r]
    L, R = torch.stack(left, 1), torch.stack(right)
    if down is None or up is None:
        return L, R
    return torch.cat([L, full(down)], 1), torch.cat([R, full(up)])


def coefficient(v: Tensor, reflection: str) -> Tensor:
    """c of I - c v v^T: 1 ("literal") or 2 / ||v||^2 ("unit"; 0 where v is 0), a 0-d tensor."""
    if reflection == "literal":
        return v.new_ones(())
    square = v.square().sum()
    nothing = square == 0
    return torch.where(nothing, 0.0, 2.0 / torch.where(nothing, 1.0, square))


def check_shapes(
    v_l: Tensor, v_r: Tensor, d: Tensor, down: Tensor | None, up: Tensor | None, reflection: str
) -> None:
    if reflection not in REFLECTIONS:
        raise ValueError(f"reflection {reflection!r} is unknown; known: {', '.join(REFLECTIONS)}")
    if v_l.dim() != 1 or v_r.dim() != 1 or tuple(d.shape) != (min(len(v_l), len(v_r)),):
        raise ValueError(
            "v_l [I], v_r [O] and d [min(I, O)] are needed, got "
            f"{list(v_l.shape)}, {list(v_r.shape)} and {list(d.shape)}"
        )
    if (down is None) != (up is None):
        raise ValueError("down and up come together: give both, or neither for b = 0")
    if down is None or up is None:
        return
    fits = down.dim() == up.dim() == 2 and down.shape[1] == up.shape[0]
    if not fits or (down.shape[0], up.shape[1]) != (len(v_l), len(v_r)):
        raise ValueError(
            f"down [I, b] and up [b, O] are needed with I = {len(v_l)} and O = {len(v_r)}, got "
            f"{list(down.shape)} and {list(up.shape)}"
        )
