"""The effective weights of several small layers of one shape, computed together.

    W_g = W0_g + s_g Delta_g,   g = 1 .. G

A small layer's update costs more in calls than in arithmetic; here every call serves all G. Other
than in `merged_linear` all W_g [O, I] are held until their gradients are there, so this is for
layers whose weights are few. Shapes: H heads, I inputs, O outputs, q columns per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .euclidean import EuclideanBlocks
from .kernel_update import KernelUpdate
from .precision import no_autocast
from .scratch import Scratch
from .sparsify import all_zero, threshold

_ALL = slice(None)


@dataclass(frozen=True)
class Member:
    """One layer: its update, params (A, B and, if mixed, alpha, gamma, beta), W0 [O, I] and s."""

    update: KernelUpdate
    params: tuple[Tensor, ...]
    weight: Tensor
    scale: float

    def alike(self) -> tuple[Any, ...]:
        """Members are grouped if this is equal."""
        u, shapes = self.update, tuple(p.shape for p in self.params)
        wanted = tuple(p.requires_grad for p in self.params)
        return u.kernel, u.rule, shapes, self.params[0].device, wanted


def grouped_weights(members: Sequence[Member]) -> tuple[Tensor, ...]:
    """W_g of every member, differentiable in the params.

    Args:
        members: All `alike`, float32, with updates that are `by_products` and have no `limit`.
    """
    params = [p for member in members for p in member.params]
    weights: tuple[Tensor, ...] = _Grouped.apply(tuple(members), *params)
    return weights


def grouped_thresholds(members: Sequence[Member]) -> tuple[Tensor, ...] | None:
    """The thresholds of all members, 0-d each, from launches that serve all of them.

    None where the fused kernels do not serve: there a layer's own is as cheap.
    """
    params = [p for member in members for p in member.params]

    def find() -> tuple[Tensor, ...] | None:
        return _fused_cut(members, _fused_group(members, params))[0].unbind(0)

    with torch.no_grad(), no_autocast(params[0].device):
        return members[0].update.attempt(params[0], find, lambda: None)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, members: tuple[Member, ...], *params: Tensor) -> tuple[Tensor, ...]:
        with no_autocast(params[0].device):
            ways = (partial(way, members, params) for way in (_forward_fused, _forward))
            weights, statistics = members[0].update.attempt(params[0], *ways)
        ctx.members = members
        ctx.save_for_backward(*params, *statistics)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        members: tuple[Member, ...] = ctx.members
        kinds = len(members[0].params)
        count = len(members) * kinds
        params, statistics = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        wanted = ctx.needs_input_grad[1 : 1 + kinds]
        with no_autocast(params[0].device):
            given = members, params, statistics, gradients, wanted
            ways = (partial(way, *given) for way in (_backward_fused, _backward))
            found = members[0].update.attempt(params[0], *ways)
        by_kind = [g.unbind(0) if g is not None else None for g in found]
        return None, *(
            None if kind is None else kind[g] for g in range(len(members)) for kind in by_kind
        )


def _forward(
    members: Sequence[Member], params: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    w = _blocks(members, params, [False] * len(params), Scratch()).dense(_ALL)
    statistics = _statistics(members, w)
    delta, _ = members[0].update.weigh(w, statistics)
    pairs = zip(members, delta, strict=True)
    return tuple(torch.add(m.weight, d, alpha=m.scale) for m, d in pairs), statistics


def _backward(
    members: Sequence[Member],
    params: Sequence[Tensor],
    statistics: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    scratch = Scratch()
    blocks = _blocks(members, params, wanted, scratch)
    w = blocks.dense(_ALL)
    _, factor = members[0].update.weigh(w, statistics)
    gw = scratch.take("gw", w.shape, w)
    for g, (one, member) in enumerate(zip(gradients, members, strict=True)):
        if one is None:
            gw[g].zero_()
        else:
            torch.mul(one, member.scale, out=gw[g])
    blocks.pull(gw.mul_(factor))
    return blocks.gradients()


def _forward_fused(
    members: Sequence[Member], params: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    from .triton import ops

    group, update = _fused_group(members, params), members[0].update
    cut = _fused_cut(members, group) if update.has_threshold else None
    weights = [member.weight for member in members]
    out = [torch.empty_like(weight) for weight in weights]
    ops.write(group, cut, _scales(members, params[0]), weights, out, update.rule)
    return tuple(out), tuple(t.view(-1, 1, 1) for t in cut or ())


def _backward_fused(
    members: Sequence[Member],
    params: Sequence[Tensor],
    statistics: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    from .triton import ops

    cut = (statistics[0].flatten(), statistics[1].flatten()) if statistics else None
    given = [
        torch.zeros_like(member.weight) if one is None else one.contiguous()
        for one, member in zip(gradients, members, strict=True)
    ]
    group, scales = _fused_group(members, params), _scales(members, params[0])
    found = ops.backward(group, cut, scales, given, members[0].update.rule)
    kinds = len(members[0].params)
    shaped = zip(found[:kinds], params[:kinds], wanted, strict=True)
    return [g.view(-1, *p.shape) if want and g is not None else None for g, p, want in shaped]


def _fused_group(members: Sequence[Member], params: Sequence[Tensor]) -> Any:
    from .triton import ops

    stacked, signs = _stack(members, params)
    return ops.prepare(stacked[0], stacked[1], signs, *stacked[2:])


def _fused_cut(members: Sequence[Member], group: Any) -> tuple[Tensor, Tensor]:
    from .triton import ops

    levels = [member.update.level for member in members]
    if any(level is None for level in levels):
        raise ValueError("each member's update must know its level as a tensor")
    cut: tuple[Tensor, Tensor] = ops.thresholds(group, torch.stack(cast(list[Tensor], levels)))
    return cut


def _scales(members: Sequence[Member], like: Tensor) -> Tensor | float:
    """One number where all are equal, which need not be copied to the device."""
    found = [member.scale for member in members]
    return found[0] if len(set(found)) == 1 else torch.tensor(found, device=like.device)


def _stack(members: Sequence[Member], params: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    kinds = len(members[0].params)
    stacked = [torch.stack(tuple(params[kind::kinds])) for kind in range(kinds)]
    return stacked, torch.stack([member.update.signs for member in members])


def _blocks(
    members: Sequence[Member], params: Sequence[Tensor], wanted: Sequence[bool], scratch: Scratch
) -> EuclideanBlocks:
    stacked, signs = _stack(members, params)
    return EuclideanBlocks(stacked, signs, wanted[: len(stacked)], scratch)


def _statistics(members: Sequence[Member], w: Tensor) -> tuple[Tensor, ...]:
    """What `KernelUpdate.measure` gives of every layer, [G, 1, 1] each."""
    update = members[0].update
    if not update.has_threshold:
        return ()
    limits = [threshold(one, m.update.sparsity) for m, one in zip(members, w, strict=True)]
    zeros = [all_zero(one) for one in w] if update.lives_at_zero else []
    return tuple(torch.stack(found).view(-1, 1, 1) for found in (limits, zeros) if found)
