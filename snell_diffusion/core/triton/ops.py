"""Functions over the fused kernels, for G layers of one shape at a time. Needs Triton.

    group = prepare(A, B, signs, alpha, gamma, beta)        row statistics
    cut   = thresholds(group, levels)                       or thresholds held from an earlier step
    write(group, cut, scale, weights, out, rule)            W0 + sparse update
    backward(group, cut, scale, dW, rule)                   gradients of A, B and mixers

Kernels `distance` and `mixed` with p = 2, float32 factors, up to 8 heads of up to 64 columns.
Nothing synchronises the device. Every result repeats bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..kernels import positive_gamma
from ..sparsify import RULES
from . import passes, passes_back
from .formulas import Cut, Matrices, Mixers, Points, Size
from .fused import MAX_COLUMNS, MAX_HEADS
from .launch import DTYPES, addresses, aligned, blocks, launch, padded, spread
from .selection import thresholds

__all__ = ["Gradients", "Group", "backward", "prepare", "row_statistics", "thresholds", "write"]

CENTRE_ROWS = 128


@dataclass(frozen=True)
class Group:
    """G layers of one shape, ready for the passes; see `prepare`.

    Attributes:
        points: A and B centred, with norms and signs.
        mixers: Scalars and row statistics of the mixed kernel, None for the distance kernel.
        size: Inputs I and outputs O.
        G, H, q, Q: Layers, heads, columns of a head, and columns with padding.
    """

    points: Points
    mixers: Mixers | None
    size: Size
    G: int
    H: int
    q: int
    Q: int

    @property
    def device(self) -> torch.device:
        return self.points.a.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """What a kernel is compiled for: H, q, Q."""
        return self.H, self.q, self.Q

    @property
    def blocks(self) -> dict[str, int]:
        """Tile and compiler options of every pass: alike, so that all build the same w."""
        return blocks(self.H, self.q)

    def strips(self, axis: str) -> tuple[int, int, int]:
        """Programs that own inputs (axis "I") or outputs ("O") and go over the other axis.

        Returns:
            Blocks along the axis, parts that the other one is cut into, and entries of a part.
        """
        edges = {"I": self.blocks["BI"], "O": self.blocks["BO"]}
        tiles = {name: triton.cdiv(n, edges[name]) for name, n in self.size._asdict().items()}
        other = "O" if axis == "I" else "I"
        each = spread(tiles[axis] * self.G, tiles[other], self.device)
        return tiles[axis], triton.cdiv(tiles[other], each), each * edges[other]

    @property
    def lse(self) -> Tensor | None:
        """Row statistics [G, I], to be given to `prepare` again; None for the distance kernel."""
        return None if self.mixers is None else self.mixers.lse


class Gradients(NamedTuple):
    """Float32: A [G, H, I, q], B [G, H, O, q], and [G] each for the mixed kernel's scalars."""

    A: Tensor
    B: Tensor
    alpha: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


@torch.no_grad()
def prepare(
    A: Tensor,
    B: Tensor,
    signs: Tensor,
    alpha: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    lse: Tensor | None = None,
) -> Group:
    """Centre the points, and compute the row statistics of the mixed kernel unless they are given.

    Args:
        A: Input-side points, [G, H, I, q] float32.
        B: Output-side points, [G, H, O, q] float32.
        signs: Head coefficients, [G, H] float32.
        alpha, gamma, beta: Scalars of the mixed kernel, G elements each, or all None: the distance
            kernel.
        lse: `Group.lse` of an earlier call with the same values, [G, I].

    Raises:
        ValueError: shapes or dtypes do not fit, or are more than the kernels do.
        LaunchError: a kernel cannot be compiled or started.
    """
    _check_factors(A, B, signs)
    G, H, I, q = A.shape
    points = _points(A, B, signs)
    size = Size(I, B.shape[2])
    group = Group(points, None, size, G, H, q, points.a.shape[-1])
    if alpha is None and gamma is None and beta is None:
        return group
    if alpha is None or gamma is None or beta is None:
        raise ValueError("the mixed kernel needs alpha, gamma and beta, the distance kernel none")
    temperature = positive_gamma(_per_layer("gamma", gamma, G))
    assert isinstance(temperature, Tensor)
    if lse is None:
        lse = row_statistics(group, temperature)
    mixers = Mixers(
        _per_layer("alpha", alpha, G), temperature, _per_layer("beta", beta, G), lse.contiguous()
    )
    return replace(group, mixers=mixers)


def row_statistics(group: Group, gamma: Tensor) -> Tensor:
    """log sum_o exp(K / gamma), [G, I]; gamma [G], above 0."""
    strips, parts, span = group.strips("I")
    lse = torch.empty(parts, group.G, group.size.I, dtype=torch.float32, device=group.device)
    launch(
        passes.row_statistics,
        (strips, group.G, parts),
        group.device,
        *(group.points, gamma, lse, group.size, span, *group.shape),
        **group.blocks,
    )
    return lse.logsumexp(0) if parts > 1 else lse[0]


def write(
    group: Group,
    cut: tuple[Tensor, Tensor] | None,
    scale: Tensor | float,
    weights: Sequence[Tensor] | None,
    out: Sequence[Tensor],
    rule: str = "squared",
) -> None:
    """Fill `out` with W0 + scale * sparse update, summed in float32 and rounded once.

    Args:
        group: The layers.
        cut: Thresholds [G] and flags of matrices that are zero everywhere [G], float32, see
            `thresholds`; None with rule 'none'.
        scale: Factor of the update, or one for each layer, [G].
        weights: W0 of each layer, [O, I] float32, bfloat16 or float16; rows contiguous, strides
            the same in all. None: the scaled update alone.
        out: Where to write, described as weights. May be the same tensors.
        rule: One of `sparsify.RULES`.

    Raises:
        ValueError: a tensor is not as described, or the rule is unknown.
        LaunchError: a kernel cannot be compiled or started.
    """
    base = _matrices(group, "weights", weights) if weights else None
    target = _matrices(group, "out", out)
    config = group.blocks
    tiles = triton.cdiv(group.size.I, config["BI"]) * triton.cdiv(group.size.O, config["BO"])
    launch(
        passes.write,
        (tiles, group.G),
        group.device,
        *(group.points, group.mixers, _cut(group, cut, rule), _scales(group, scale)),
        *(base, target, group.size, *group.shape),
        RULE=rule,
        BASE=DTYPES[weights[0].dtype] if weights else None,
        OUT=DTYPES[out[0].dtype],
        ALIGNED=aligned([*(weights or []), *out]),
        **config,
    )


def backward(
    group: Group,
    cut: tuple[Tensor, Tensor] | None,
    scale: Tensor | float,
    dW: Sequence[Tensor],
    rule: str = "squared",
) -> Gradients:
    """Gradients of what `write` was given, from those of what it wrote.

    That of gamma passes its lower bound, as in `kernels.positive_gamma`. Pairs of points at
    distance zero have none. The sparsify rule's threshold is a constant.

    Args:
        group, cut, scale, rule: As in `write`.
        dW: Gradient of each layer's weight, [O, I], described as the weights of `write`.

    Raises:
        ValueError: a tensor is not as described, or the rule is unknown.
        LaunchError: a kernel cannot be compiled or started.
    """
    given = _matrices(group, "dW", dW)
    limits, scales = _cut(group, cut, rule), _scales(group, scale)

    def run(kernel: Any, axis: str, shape: tuple[int, ...], *extra: Tensor | None) -> Tensor:
        strips, parts, span = group.strips(axis)
        result = torch.empty(parts, *shape, dtype=torch.float32, device=group.device)
        launch(
            kernel,
            (strips, group.G, parts),
            group.device,
            *(group.points, group.mixers, limits, scales, given, *extra, result),
            *(group.size, span, *group.shape),
            RULE=rule,
            GRAD=DTYPES[dW[0].dtype],
            ALIGNED=aligned(dW),
            **group.blocks,
        )
        return result.sum(0) if parts > 1 else result[0]

    G, H, (I, O), q = group.G, group.H, group.size, group.q
    sums = None if group.mixers is None else run(passes_back.row_sums, "I", (4, G, I))
    dA = run(passes_back.input_points, "I", (G, H, I, q), sums)
    dB = run(passes_back.output_points, "O", (G, H, O, q), sums)
    return Gradients(dA, dB, *_mixer_gradients(group.mixers, sums))


def _mixer_gradients(mixers: Mixers | None, sums: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of alpha, gamma and beta, [G] each, from the row sums [4, G, I].

    dL/dgamma = -alpha / gamma sum_io P (g - r) K / gamma, and K / gamma may be moved by any number
    of the row, since sum_o P (g - r) = 0.
    """
    if mixers is None or sums is None:
        return None, None, None
    r, plain, weighted, entropy = sums
    gamma = -mixers.alpha / mixers.gamma * (weighted - r * entropy).sum(1)
    return r.sum(1), gamma, plain.sum(1)


def _points(A: Tensor, B: Tensor, signs: Tensor) -> Points:
    (G, H, I, q), O = A.shape, B.shape[2]
    Q = padded(q)
    points = Points(
        a=A.new_empty(G, H, I, Q),
        b=A.new_empty(G, H, O, Q),
        a_norm=A.new_empty(G, H, I),
        b_norm=A.new_empty(G, H, O),
        signs=signs.contiguous(),
    )
    launch(
        passes.centre,
        (triton.cdiv(max(I, O), CENTRE_ROWS), G * H),
        A.device,
        *(A.contiguous(), B.contiguous(), points, Size(I, O), q, Q),
        ROWS=CENTRE_ROWS,
    )
    return points


def _per_layer(name: str, values: Tensor, G: int) -> Tensor:
    if values.numel() != G or values.dtype != torch.float32:
        raise ValueError(
            f"{name} must be {G} float32 numbers, one a layer, "
            f"got {list(values.shape)} {values.dtype}"
        )
    return values.reshape(G).contiguous()


def _scales(group: Group, scale: Tensor | float) -> Tensor:
    if isinstance(scale, Tensor):
        return _per_layer("scale", scale, group.G)
    return torch.full((group.G,), scale, dtype=torch.float32, device=group.device)


def _cut(group: Group, cut: tuple[Tensor, Tensor] | None, rule: str) -> Cut | None:
    if rule not in RULES:
        raise ValueError(f"sparsify rule {rule!r} is unknown; known: {', '.join(RULES)}")
    if rule == "none":
        return None
    if cut is None:
        raise ValueError(f"rule {rule!r} needs the thresholds and zero flags of `thresholds`")
    t, is_zero = cut
    return Cut(_per_layer("threshold", t, group.G), _per_layer("is_zero", is_zero, group.G))


def _matrices(group: Group, name: str, tensors: Sequence[Tensor]) -> Matrices:
    """One matrix a layer, all of them checked."""
    wanted, first = (group.size.O, group.size.I), tensors[0]
    if len(tensors) != group.G:
        raise ValueError(f"{name} must hold {group.G} matrices, one a layer, got {len(tensors)}")
    for t in tensors:
        rows = t.shape == wanted and t.stride(1) == 1 and t.stride() == first.stride()
        if not rows or t.device != group.device or t.dtype not in DTYPES or t.dtype != first.dtype:
            raise ValueError(
                f"{name} must be {list(wanted)} matrices with contiguous rows, of one 16 or 32 bit "
                f"float dtype and one layout, on {group.device}, got {list(t.shape)} with strides "
                f"{list(t.stride())}, {t.dtype}, {t.device}"
            )
    return Matrices(addresses(tensors), first.stride(0))


def _check_factors(A: Tensor, B: Tensor, signs: Tensor) -> None:
    fits = A.ndim == B.ndim == 4 and A.shape[:2] == B.shape[:2] and A.shape[3] == B.shape[3]
    if not fits or signs.shape != A.shape[:2]:
        raise ValueError(
            "expected A [G, H, I, q], B [G, H, O, q] and signs [G, H], "
            f"got {list(A.shape)}, {list(B.shape)} and {list(signs.shape)}"
        )
    if {A.dtype, B.dtype, signs.dtype} != {torch.float32}:
        raise ValueError(
            f"the fused kernels take float32 factors, got {A.dtype}, {B.dtype} and {signs.dtype}"
        )
    if A.shape[1] > MAX_HEADS or A.shape[3] > MAX_COLUMNS:
        raise ValueError(
            f"the fused kernels take up to {MAX_HEADS} heads of up to {MAX_COLUMNS} columns, "
            f"got {A.shape[1]} of {A.shape[3]}"
        )
