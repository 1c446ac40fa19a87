"""Updates that are built, and differentiated, one block of input columns at a time.

A block is some columns of the update Delta [O,I]: whole columns, since the softmax of a mixed
kernel runs over the outputs. Between forward and backward pass an update is known by its params and
a few numbers (`BlockUpdate.measure`: a threshold); no [O,I] intermediate outlives a pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full, no_autocast
from .scratch import Scratch

DeltaFn = Callable[..., Tensor]
T = TypeVar("T")

BLOCK_ENTRIES = {"cpu": 2**17}
"""Entries of Delta that are worked on together by type of device: transient memory is a small
multiple of it (about 3 + 2 H floats an entry for H heads). On the CPU a block stays in the cache;
elsewhere a larger one saves launches."""
OTHER_BLOCK_ENTRIES = 2**22
ALIGNMENT = 32
PANEL_COLUMNS = 384  # products of fewer columns are a sixth slower


class Walk(ABC):
    """One pass over the columns of an update, without gradients of its own.

    `delta` gives a block, a tensor the caller may not write to and the next block may overwrite;
    `pull` takes the gradient of the block just given; `gradients` ends the walk. `kept` is a matrix
    [O, I] of which the walk will not read a block again that it has given.
    """

    kept: Tensor | None = None

    @abstractmethod
    def delta(self, columns: slice) -> Tensor:
        """Delta[:, columns], [O, W]."""

    def fold_into(self, out: Tensor, columns: slice, weight: Tensor | None, scale: float) -> None:
        """out = weight + scale * delta(columns), all [O, W]; rounded as `place` does."""
        place(out, self.delta(columns), weight, scale)

    @abstractmethod
    def pull(self, gdelta: Tensor) -> None:
        """Add what the last block's gradient [O, W] gives to the gradients of the params."""

    @abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """By param; None where none is wanted."""


class BlockUpdate(ABC):
    """A pure function of params, Delta [O, I], that can be taken apart into blocks of columns.

    Calling it gives the whole of Delta, differentiable in the params.
    """

    splits = True  # whether a walk may ask for fewer than all columns
    statistics: int  # how many `measure` returns

    @abstractmethod
    def shape(self, params: Sequence[Tensor]) -> tuple[int, int]:
        """(O, I)."""

    @abstractmethod
    def measure(self, params: Sequence[Tensor], scratch: Scratch) -> tuple[tuple[Tensor, ...], Any]:
        """Statistics that later walks need, and what may be kept of the work till the next walk."""

    @abstractmethod
    def walk(
        self,
        params: Sequence[Tensor],
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        scratch: Scratch,
        kept: Any = None,
    ) -> Walk:
        """Start a pass; `wanted` says which params need gradients, `kept` is from `measure`."""

    def columns(self, params: Sequence[Tensor]) -> Iterator[slice]:
        """The blocks of a walk: slices that cover 0 to I."""
        if not self.splits:
            yield slice(None)
            return
        outputs, inputs = self.shape(params)
        entries = BLOCK_ENTRIES.get(params[0].device.type, OTHER_BLOCK_ENTRIES)
        blocks = math.ceil(inputs * outputs / entries)
        # Even blocks, since a last one of a few columns costs almost as much as a full one, and of
        # widths that matrix products like.
        width = math.ceil(max(1, math.ceil(inputs / max(1, blocks))) / ALIGNMENT) * ALIGNMENT
        for start in range(0, inputs, width):
            yield slice(start, min(start + width, inputs))

    def panels(self, params: Sequence[Tensor]) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Neighbouring blocks whose products with x and gy are taken together: the panel's columns,
        and every block's in the matrix and in the panel."""
        blocks: list[slice] = []
        for columns in self.columns(params):
            blocks.append(columns)
            if not self.splits:
                yield columns, [(columns, columns)]
            elif columns.stop - blocks[0].start >= PANEL_COLUMNS:
                yield _panel(blocks)
                blocks = []
        if blocks and self.splits:
            yield _panel(blocks)

    def __call__(self, *params: Tensor) -> Tensor:
        delta: Tensor = _Whole.apply(self, *params)
        return delta


def _panel(blocks: list[slice]) -> tuple[slice, list[tuple[slice, slice]]]:
    start = blocks[0].start
    local = [slice(block.start - start, block.stop - start) for block in blocks]
    return slice(start, blocks[-1].stop), list(zip(blocks, local, strict=True))


class _Whole(torch.autograd.Function):
    """Delta [O, I] as one tensor; its backward pass builds the blocks again."""

    @staticmethod
    def forward(ctx: Any, update: BlockUpdate, *params: Tensor) -> Tensor:
        with no_autocast(params[0].device):
            scratch = Scratch(pooled=False)  # what it holds is returned
            statistics, kept = update.measure(params, scratch)
            ctx.update, ctx.count = update, len(params)
            ctx.save_for_backward(*params, *statistics)
            walk = update.walk(params, statistics, [False] * len(params), scratch, kept)
            return assemble(update, params, walk, scratch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gdelta: Tensor) -> tuple[Tensor | None, ...]:
        params, statistics = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with no_autocast(gdelta.device):
            walk = ctx.update.walk(params, statistics, ctx.needs_input_grad[1:], Scratch())
            for columns in ctx.update.columns(params):
                walk.delta(columns)
                walk.pull(gdelta[:, columns])
            return None, *walk.gradients()


class WholeUpdate(BlockUpdate):
    """Any pure function of params that makes Delta [O, I], as one block.

    Raises:
        ValueError: The function returns another shape than that of `weight`, where one is given.
    """

    splits, statistics = False, 0

    def __init__(self, delta_fn: DeltaFn, weight: Tensor | None = None) -> None:
        self.delta_fn, self._weight = delta_fn, weight

    def build(self, params: Sequence[Tensor]) -> Tensor:
        return check_shape(self.delta_fn(*params), self._weight)

    def shape(self, params: Sequence[Tensor]) -> tuple[int, int]:
        outputs, inputs = self.build(params).shape
        return outputs, inputs

    def __call__(self, *params: Tensor) -> Tensor:
        return self.build(params)

    def measure(self, params: Sequence[Tensor], scratch: Scratch) -> tuple[tuple[Tensor, ...], Any]:
        return (), None

    def walk(
        self,
        params: Sequence[Tensor],
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        scratch: Scratch,
        kept: Any = None,
    ) -> Walk:
        return _WholeWalk(self, params, wanted)


class _WholeWalk(Walk):
    def __init__(
        self, update: WholeUpdate, params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> None:
        self._update = update
        self._gradients: list[Tensor | None] = [None] * len(params)
        self._leaves = [p.detach().requires_grad_(w) for p, w in zip(params, wanted, strict=True)]

    def delta(self, columns: slice) -> Tensor:
        with torch.set_grad_enabled(any(leaf.requires_grad for leaf in self._leaves)):
            self._delta = self._update.build(self._leaves)
        return self._delta.detach()

    def pull(self, gdelta: Tensor) -> None:
        self._gradients = param_gradients(self._delta, self._leaves, gdelta)

    def gradients(self) -> list[Tensor | None]:
        return self._gradients


class ScaledSum(BlockUpdate):
    """The sum of scaled updates: each part is a function, its number of params and its scale."""

    def __init__(self, parts: Sequence[tuple[BlockUpdate, int, float]]) -> None:
        self.parts = parts
        self.splits = all(update.splits for update, _, _ in parts)
        self.statistics = sum(update.statistics for update, _, _ in parts)

    def shape(self, params: Sequence[Tensor]) -> tuple[int, int]:
        update, count, _ = self.parts[0]
        return update.shape(params[:count])

    def measure(self, params: Sequence[Tensor], scratch: Scratch) -> tuple[tuple[Tensor, ...], Any]:
        found = [
            self.parts[i][0].measure(own, scratch.part(i))
            for i, own in enumerate(self._split(params))
        ]
        return tuple(t for statistics, _ in found for t in statistics), [kept for _, kept in found]

    def walk(
        self,
        params: Sequence[Tensor],
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        scratch: Scratch,
        kept: Any = None,
    ) -> Walk:
        kept = kept or [None] * len(self.parts)
        walks, start = [], 0
        for i, (own, want) in enumerate(zip(self._split(params), self._split(wanted), strict=True)):
            update, _, scale = self.parts[i]
            stop = start + update.statistics
            walks.append(
                (update.walk(own, statistics[start:stop], want, scratch.part(i), kept[i]), scale)
            )
            start = stop
        return _SumWalk(walks)

    def __call__(self, *params: Tensor) -> Tensor:
        if self.splits and not torch.compiler.is_compiling():
            return super().__call__(*params)
        pairs = zip(self.parts, self._split(params), strict=True)
        return _scaled_sum((update(*own), scale) for (update, _, scale), own in pairs)

    def _split(self, values: Sequence[T]) -> list[Sequence[T]]:
        ends = list(accumulate((count for _, count, _ in self.parts), initial=0))
        return [values[start:end] for start, end in pairwise(ends)]


def _scaled_sum(terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    total: Tensor | None = None
    for delta, scale in terms:
        delta = delta if scale == 1.0 else delta * scale
        total = delta if total is None else total + delta
    assert total is not None
    return total


class _SumWalk(Walk):
    def __init__(self, walks: Sequence[tuple[Walk, float]]) -> None:
        self._walks = walks

    def delta(self, columns: slice) -> Tensor:
        return _scaled_sum((walk.delta(columns), scale) for walk, scale in self._walks)

    def fold_into(self, out: Tensor, columns: slice, weight: Tensor | None, scale: float) -> None:
        if len(self._walks) > 1:
            super().fold_into(out, columns, weight, scale)
            return
        walk, own = self._walks[0]
        walk.fold_into(out, columns, weight, own * scale)

    def pull(self, gdelta: Tensor) -> None:
        for walk, _ in self._walks:
            walk.pull(gdelta)

    def gradients(self) -> list[Tensor | None]:
        # Linear in the gradient that was pulled, so the scale can wait for the small results.
        return [
            g if g is None or scale == 1.0 else g * scale
            for walk, scale in self._walks
            for g in walk.gradients()
        ]


def assemble(
    update: BlockUpdate,
    params: Sequence[Tensor],
    walk: Walk,
    scratch: Scratch,
    weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Delta [O, I] in `dtype`, or `fold(weight, Delta)` without holding Delta as a whole.

    What the walk keeps is written over where it has the right dtype: large memory is slow to get.
    """
    if not update.splits:
        delta = check_shape(walk.delta(slice(None)), weight)
        return delta.to(dtype or delta.dtype) if weight is None else fold(weight, delta)
    dtype = (dtype or full(params[0]).dtype) if weight is None else weight.dtype
    out = walk.kept
    if out is None or out.dtype != dtype:
        out = scratch.take("out", update.shape(params), params[0], dtype)
    for columns in update.columns(params):
        walk.fold_into(
            out[:, columns], columns, None if weight is None else weight[:, columns], 1.0
        )
    return out


def place(out: Tensor, delta: Tensor, base: Tensor | None, scale: float) -> None:
    """out = base + scale * delta, summed in the wider dtype, rounded to that of base, then out."""
    if base is not None and out.dtype == base.dtype == delta.dtype:
        torch.add(base, delta, alpha=scale, out=out)
        return
    delta = delta if scale == 1.0 else delta * scale
    out.copy_(delta if base is None else fold(base, delta))


def fold(weight: Tensor, delta: Tensor) -> Tensor:
    """W0 + Delta [O, I], summed in the wider of both dtypes and rounded once to that of W0."""
    return (delta.contiguous() + weight).to(weight.dtype)


def check_shape(delta: Tensor, weight: Tensor | None) -> Tensor:
    """Delta, shaped as the weight.

    Raises:
        ValueError: It is not.
    """
    if weight is not None and delta.shape != weight.shape:
        raise ValueError(
            f"delta_fn must return [O, I] = {list(weight.shape)}, got {list(delta.shape)}"
        )
    return delta


def param_gradients(
    delta: Tensor, leaves: Sequence[Tensor], gdelta: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the params from that of Delta [O, I]; None where none is wanted."""
    wanted = [p for p in leaves if p.requires_grad]
    if not wanted or gdelta is None:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(delta, wanted, gdelta.to(delta.dtype), allow_unused=True))
    return [next(found) if p.requires_grad else None for p in leaves]
