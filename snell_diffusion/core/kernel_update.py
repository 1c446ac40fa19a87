"""The update of `update`, taken apart into blocks of input columns.

Two ways to compute a block: Euclidean kernels in float32 by matrix products, with a hand-written
backward pass (`_ProductWalk`); every other case by the plain formulas and autograd, block by block
(`_PlainWalk`). Both use one threshold, measured over all blocks, and rebuild a block from the
params when its gradient is due. Shapes: H heads, I inputs, O outputs, q columns per head, W columns
of a block; blocks are [O, W], as in the weight of a Linear.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .blocks import BlockUpdate, Walk
from .euclidean import EuclideanBlocks
from .kernels import PRODUCT_MIN_COLUMNS
from .precision import at_hand, full
from .scratch import Scratch
from .select import AT_HAND, WHOLE_ENTRIES, streamed_quantile
from .sparsify import (
    LIVE_AT_ZERO,
    FirstThreshold,
    Threshold,
    all_zero,
    check_rule,
    threshold,
    weigh,
)
from .triton.fused import attempt, serves
from .update import dense, update

T = TypeVar("T")


@dataclass(frozen=True)
class KernelUpdate(BlockUpdate):
    """sparsify(w, sparsity)^T [O, I] as a function of A, B and, if mixed, alpha, gamma, beta.

    Args and errors as `update`; `limit` is a 0-d magnitude to use in place of the level's quantile.
    Compiled code gets the plain formula, with `level` (0-d float64) as an input of it.
    """

    signs: Tensor
    sparsity: float = 0.0
    kernel: str = "mixed"
    p: float = 2.0
    rule: str = "squared"
    limit: Tensor | None = None
    level: Tensor | None = None

    @property
    def _asked(self) -> float | Tensor:
        return self.sparsity if self.level is None else self.level

    def __post_init__(self) -> None:
        check_rule(self.rule, self.sparsity)

    @property
    def statistics(self) -> int:  # type: ignore[override]
        return int(self.has_threshold) + int(self.lives_at_zero)

    @property
    def has_threshold(self) -> bool:
        """Whether anything can be dropped."""
        return self.rule != "none" or self.limit is not None

    @property
    def lives_at_zero(self) -> bool:
        """Whether a matrix that is zero everywhere is a case of its own."""
        return self.rule in LIVE_AT_ZERO and self.rule != "none"

    def shape(self, params: Sequence[Tensor]) -> tuple[int, int]:
        return params[1].shape[1], params[0].shape[1]

    def measure(self, params: Sequence[Tensor], scratch: Scratch) -> tuple[tuple[Tensor, ...], Any]:
        """The threshold, for `mask` and `soft` also whether w is zero everywhere; and w [O, I]."""
        plain = partial(self._measure, params, scratch)
        return self.attempt(params[0], partial(self._measure_fused, params), plain)

    def attempt(self, A: Tensor, fused: Callable[[], T], plain: Callable[[], T]) -> T:
        """fused() where the fused kernels serve this update and start, else plain()."""
        return attempt(A.device, fused, plain) if serves(A, self.kernel, self.p) else plain()

    def weigh(self, w: Tensor, statistics: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`sparsify.weigh` by what was measured: any part of w or, with statistics [G, 1, 1], of a
        stack."""
        t = statistics[0] if statistics else w.new_zeros(())
        return weigh(w, t, self.rule, statistics[1] if len(statistics) > 1 else None)

    def _measure_fused(self, params: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Any]:
        from .triton import walk

        group = walk.prepare(params, self.signs)
        if not self.has_threshold:
            return (), group
        if self.limit is not None and not self.lives_at_zero:
            return (self.limit,), group
        t, is_zero = walk.measure(group, self.sparsity)
        found = (t if self.limit is None else self.limit, is_zero)
        return found[: self.statistics], group

    def _measure(
        self, params: Sequence[Tensor], scratch: Scratch
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        if not self.has_threshold:
            return (), None
        walk = self._walk(params, (), [False] * len(params), scratch, None)
        most = WHOLE_ENTRIES * (AT_HAND if at_hand(params[0]) else 1)
        if math.prod(self.shape(params)) > most and params[0].dtype != torch.float64:
            return self._measure_blocks(params, walk), None
        w = self._whole(params, walk, scratch)
        t = threshold(w, self.sparsity) if self.limit is None else self.limit
        return (t, *([all_zero(w)] if self.lives_at_zero else [])), w

    def _whole(self, params: Sequence[Tensor], walk: "_Walk", scratch: Scratch) -> Tensor:
        """w [O, I]; scratch."""
        w: Tensor | None = None
        for columns in self.columns(params):
            block = walk.dense(columns)
            if block.shape == self.shape(params):
                return block
            w = scratch.take("whole", self.shape(params), block) if w is None else w
            w[:, columns] = block
        assert w is not None
        return w

    def by_products(self, A: Tensor) -> bool:
        """Whether blocks come from matrix products, `euclidean.EuclideanBlocks`."""
        euclidean = self.kernel != "linear" and self.p == 2 and A.dtype != torch.float64
        return euclidean and A.shape[-1] >= PRODUCT_MIN_COLUMNS

    def whole(self, params: Sequence[Tensor]) -> Tensor:
        """w [O, I] before the sparsify rule, without gradients."""
        scratch = Scratch(pooled=False)
        walk = self._walk(params, (), [False] * len(params), scratch, None)
        blocks = [walk.dense(columns).clone() for columns in self.columns(params)]
        return torch.cat(blocks, 1)

    def _measure_blocks(self, params: Sequence[Tensor], walk: "_Walk") -> tuple[Tensor, ...]:
        def magnitudes() -> Iterator[Tensor]:
            return (walk.dense(columns).abs_() for columns in self.columns(params))

        t = self.limit
        if t is None:
            size = math.prod(self.shape(params))
            t = streamed_quantile(magnitudes, size, self.sparsity, params[0].device)
        if not self.lives_at_zero:
            return (t,)
        largest = torch.stack([block.amax() for block in magnitudes()])
        return t, all_zero(largest)

    def walk(
        self,
        params: Sequence[Tensor],
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        scratch: Scratch,
        kept: Any = None,
    ) -> Walk:
        w = kept if isinstance(kept, Tensor) else None
        plain = partial(self._walk, params, statistics, wanted, scratch, w)
        if w is not None or not serves(params[0], self.kernel, self.p):
            return plain()
        from .triton.walk import FusedWalk

        own = [p.detach() for p in params]
        return FusedWalk(own, self.signs, self.rule, statistics, wanted, plain, kept)

    def _walk(
        self,
        params: Sequence[Tensor],
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        scratch: Scratch,
        kept: Tensor | None,
    ) -> "_Walk":
        kind = _ProductWalk if self.by_products(params[0]) else _PlainWalk
        return kind(self, [full(p.detach()) for p in params], statistics, wanted, scratch, kept)

    def __call__(self, *params: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().__call__(*params)
        limit: Threshold = self.limit if self.limit is not None else FirstThreshold(self._asked)
        A, B, *scalars = params
        mixers: dict[str, Any] = dict(zip(("alpha", "gamma", "beta"), scalars, strict=False))
        return update(
            A,
            B,
            self.signs,
            **mixers,
            kernel=self.kernel,
            p=self.p,
            rule=self.rule,
            threshold=limit,
        ).T


class _Walk(Walk):
    """What both ways share: the sparsify rule."""

    def __init__(
        self,
        update: KernelUpdate,
        params: list[Tensor],
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        scratch: Scratch,
        kept: Tensor | None,
    ) -> None:
        self._update, self._statistics = update, statistics
        self.params, self.wanted = params, wanted
        self.scratch, self.kept = scratch, kept
        self._factor: Tensor | None = None

    @abstractmethod
    def dense(self, columns: slice) -> Tensor:
        """w[:, columns], [O, W]."""

    @abstractmethod
    def pull_dense(self, gw: Tensor) -> None:
        """Take the gradient of the last `dense` block, a tensor to be used up."""

    def delta(self, columns: slice) -> Tensor:
        w = self.dense(columns) if self.kept is None else self.kept[:, columns]
        delta, self._factor = self._update.weigh(w, self._statistics)
        return delta

    def pull(self, gdelta: Tensor) -> None:
        assert self._factor is not None
        alike = (gdelta.shape, gdelta.dtype) == (self._factor.shape, self._factor.dtype)
        gw = self._factor.mul_(gdelta) if alike else gdelta * self._factor
        self._factor = None
        self.pull_dense(gw)


class _PlainWalk(_Walk):
    """Blocks by `update.dense` and autograd."""

    def __init__(self, update: KernelUpdate, *rest: Any) -> None:
        super().__init__(update, *rest)
        self._gradients: list[Tensor | None] = [
            torch.zeros_like(p) if wanted else None
            for p, wanted in zip(self.params, self.wanted, strict=True)
        ]

    def dense(self, columns: slice) -> Tensor:
        leaves = [self.params[0][:, columns], *self.params[1:]]
        self._leaves = [
            t.detach().requires_grad_(w) for t, w in zip(leaves, self.wanted, strict=True)
        ]
        self._columns = columns
        with torch.set_grad_enabled(any(self.wanted)):
            A, B, *scalars = self._leaves
            u = self._update
            self._w = dense(A, B, u.signs, *scalars, kernel=u.kernel, p=u.p).T
        return self._w.detach()

    def pull_dense(self, gw: Tensor) -> None:
        leaves = [leaf for leaf in self._leaves if leaf.requires_grad]
        if not leaves:
            return
        found = iter(torch.autograd.grad(self._w, leaves, gw.to(self._w.dtype)))
        for i, total in enumerate(self._gradients):
            if total is not None:
                part = total[:, self._columns] if i == 0 else total
                part += next(found)

    def gradients(self) -> list[Tensor | None]:
        return self._gradients


class _ProductWalk(_Walk):
    """Blocks by matrix products, see `EuclideanBlocks`."""

    def __init__(self, update: KernelUpdate, *rest: Any) -> None:
        super().__init__(update, *rest)
        self._blocks: EuclideanBlocks | None = None

    @property
    def _euclidean(self) -> "EuclideanBlocks":
        if self._blocks is None:  # a walk that was given w never asks
            stacked = [p.unsqueeze(0) for p in self.params]
            signs = self._update.signs.unsqueeze(0)
            self._blocks = EuclideanBlocks(stacked, signs, self.wanted, self.scratch)
        return self._blocks

    def dense(self, columns: slice) -> Tensor:
        return self._euclidean.dense(columns)[0]

    def pull_dense(self, gw: Tensor) -> None:
        self._euclidean.pull(gw.unsqueeze(0))

    def gradients(self) -> list[Tensor | None]:
        return [None if g is None else g.squeeze(0) for g in self._euclidean.gradients()]
