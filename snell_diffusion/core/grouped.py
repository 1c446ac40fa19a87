"""The effective weights of several small layers of one shape, computed together.

    W_g = W0_g + s_g Delta_g,   g = 1 .. G

A small layer's update costs more in calls than in arithmetic; here every call serves all G. Other
than in `merged_linear` all W_g [O, I] are held until their gradients are there, so this is for
layers whose weights are few. Shapes: H heads, I inputs, O outputs, q columns per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .euclidean import EuclideanBlocks
from .kernel_update import KernelUpdate
from .precision import no_autocast
from .scratch import Scratch
from .sparsify import LIVE_AT_ZERO, all_zero, threshold, weigh

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
        u, A = self.update, self.params[0]
        wanted = tuple(p.requires_grad for p in self.params)
        return u.kernel, u.rule, tuple(A.shape), tuple(self.weight.shape), A.device, wanted


def grouped_weights(members: Sequence[Member]) -> tuple[Tensor, ...]:
    """W_g of every member, differentiable in the params.

    Args:
        members: All `alike`, float32, with updates that are `by_products`.
    """
    params = [p for member in members for p in member.params]
    weights: tuple[Tensor, ...] = _Grouped.apply(tuple(members), *params)
    return weights


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, members: tuple[Member, ...], *params: Tensor) -> tuple[Tensor, ...]:
        update = members[0].update
        with no_autocast(params[0].device):
            w = _blocks(members, params, [False] * 5, Scratch()).dense(_ALL)
            statistics = _statistics(members, w)
            delta, _ = _weigh(w, statistics, update)
            ctx.members = members
            ctx.save_for_backward(*params, *statistics)
            pairs = zip(members, delta, strict=True)
            return tuple(torch.add(m.weight, d, alpha=m.scale) for m, d in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        members, update = ctx.members, ctx.members[0].update
        count = len(members) * len(members[0].params)
        params, statistics = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        kinds = len(members[0].params)
        wanted = ctx.needs_input_grad[1 : 1 + kinds]
        scratch = Scratch()
        with no_autocast(params[0].device):
            blocks = _blocks(members, params, wanted, scratch)
            w = blocks.dense(_ALL)
            _, factor = _weigh(w, statistics, update)
            gw = scratch.take("gw", w.shape, w)
            for g, (one, member) in enumerate(zip(gradients, members, strict=True)):
                if one is None:
                    gw[g].zero_()
                else:
                    torch.mul(one, member.scale, out=gw[g])
            blocks.pull(gw.mul_(factor))
            by_kind = [None if found is None else found.unbind(0) for found in blocks.gradients()]
        return None, *(
            None if found is None else found[g] for g in range(len(members)) for found in by_kind
        )


def _blocks(
    members: Sequence[Member], params: Sequence[Tensor], wanted: Sequence[bool], scratch: Scratch
) -> EuclideanBlocks:
    kinds = len(members[0].params)
    stacked = [torch.stack(tuple(params[kind::kinds])) for kind in range(kinds)]
    signs = torch.stack([member.update.signs for member in members])
    return EuclideanBlocks(stacked, signs, wanted[:kinds], scratch)


def _weigh(w: Tensor, statistics: Sequence[Tensor], update: KernelUpdate) -> tuple[Tensor, Tensor]:
    return weigh(w, statistics[0], update.rule, statistics[1] if len(statistics) > 1 else None)


def _statistics(members: Sequence[Member], w: Tensor) -> tuple[Tensor, ...]:
    """Thresholds [G, 1, 1] and, for rules that live at zero, which matrices are zero."""
    rule = members[0].update.rule
    updates = [member.update for member in members]
    limits = [
        threshold(one, update.sparsity) if update.limit is None else update.limit
        for update, one in zip(updates, w, strict=True)
    ]
    found = [torch.stack(limits).view(-1, 1, 1)]
    if rule in LIVE_AT_ZERO and rule != "none":
        found.append(torch.stack([all_zero(one) for one in w]).view(-1, 1, 1))
    return tuple(found)
