"""One layer's update in blocks of columns, by the fused kernels. Needs Triton.

A launch that fails is made good by the plain walk, in the middle of a pass too: what blocks before
it gave to the gradients is kept, and both are added up.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..blocks import Walk
from . import ops
from .fused import LaunchError
from .launch import DTYPES


class FusedWalk(Walk):
    """Blocks [O, W] of one layer's update, and the gradients of its params.

    Args:
        params: A [H, I, q], B [H, O, q] and, if mixed, alpha, gamma and beta; float32.
        signs: [H].
        rule: One of `sparsify.RULES`.
        statistics: Threshold, and for `mask` and `soft` 1 if the matrix is zero everywhere; 0-d.
        wanted: Which params need gradients.
        plain: Starts the walk that serves after a failure.
        whole: `measure`'s group, if it is at hand.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        signs: Tensor,
        rule: str,
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        plain: Callable[[], Walk],
        whole: ops.Group | None = None,
    ) -> None:
        self._params, self._signs, self._rule, self._wanted = params, signs, rule, wanted
        self._start_plain, self._whole = plain, whole
        self._plain: Walk | None = None
        self._cut: tuple[Tensor, Tensor] | None = None
        if rule != "none":
            t = statistics[0].view(1).float()
            self._cut = t, statistics[1].view(1) if len(statistics) > 1 else torch.zeros_like(t)
        self._totals: list[Tensor] | None = None
        self._added: list[slice] = []

    def delta(self, columns: slice) -> Tensor:
        if self._plain is None:
            try:
                return self._write(columns, None, None, 1.0)
            except LaunchError:
                self._plain = self._start_plain()
        return self._plain.delta(columns)

    def fold_into(self, out: Tensor, columns: slice, weight: Tensor | None, scale: float) -> None:
        """As the base's, without holding the delta."""
        given = [t for t in (out, weight) if t is not None]
        if any(t.dtype not in DTYPES or t.stride(1) != 1 for t in given):
            super().fold_into(out, columns, weight, scale)
            return
        if self._plain is None:
            try:
                self._write(columns, weight, out, scale)
                return
            except LaunchError:
                self._plain = self._start_plain()
        self._plain.fold_into(out, columns, weight, scale)

    def pull(self, gdelta: Tensor) -> None:
        if not any(self._wanted):
            return
        if self._plain is None:
            try:
                self._add(gdelta)
                return
            except LaunchError:
                self._plain = self._start_plain()
                self._plain.delta(self._columns)
        self._plain.pull(gdelta)

    def gradients(self) -> list[Tensor | None]:
        own: list[Tensor | None] = [None] * len(self._params)
        own = own if self._totals is None else [*self._totals]
        if self._plain is not None:
            own = [_sum(a, b) for a, b in zip(own, self._rest(self._plain), strict=True)]
        return [g if wanted else None for g, wanted in zip(own, self._wanted, strict=True)]

    def _rest(self, plain: Walk) -> list[Tensor | None]:
        """Of the plain walk, which says nothing of columns of A that it has not seen."""
        A, *others = plain.gradients()
        for columns in self._added:
            if A is not None:
                A[:, columns] = 0
        return [A, *others]

    def _write(
        self, columns: slice, weight: Tensor | None, out: Tensor | None, scale: float
    ) -> Tensor:
        self._columns, self._group = columns, self._group_of(columns)
        if out is None:
            I, O = self._group.size
            out = torch.empty(O, I, device=self._group.device)
        base = None if weight is None else [weight]
        ops.write(self._group, self._cut, scale, base, [out], self._rule)
        return out

    def _add(self, gdelta: Tensor) -> None:
        if gdelta.dtype not in DTYPES or gdelta.stride(1) != 1:
            gdelta = gdelta.float().contiguous()
        found = ops.backward(self._group, self._cut, 1.0, [gdelta], self._rule)
        if self._totals is None:
            self._totals = [torch.zeros_like(p) for p in self._params]
        A, *others = (g[0] for g in found if g is not None)
        self._totals[0][:, self._columns] += A
        for total, part in zip(self._totals[1:], others, strict=True):
            total += part
        self._added.append(self._columns)

    def _group_of(self, columns: slice) -> ops.Group:
        A, *others = self._params
        if self._whole is not None and columns.indices(A.shape[1]) == (0, A.shape[1], 1):
            return self._whole
        return prepare([A[:, columns], *others], self._signs)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def prepare(params: Sequence[Tensor], signs: Tensor) -> ops.Group:
    """A group of one layer, from what `FusedWalk` takes."""
    A, B, *mixers = (p.detach() for p in params)
    return ops.prepare(A[None], B[None], signs[None], *mixers)


def measure(group: ops.Group, sparsity: float) -> tuple[Tensor, Tensor]:
    """Threshold at a level, and 1 if the matrix is zero everywhere, else 0; 0-d float32."""
    level = torch.full((1,), sparsity, dtype=torch.float64, device=group.device)
    t, is_zero = ops.thresholds(group, level)
    return t[0], is_zero[0]
