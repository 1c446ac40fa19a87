"""A frozen Linear and its update as one matrix product, holding nothing but the input.

    y = x (W0 + Delta)^T + b,   Delta = delta_fn(*params)

The plain formulation keeps every [O,I] intermediate of Delta for the backward pass; here Delta is
built again there, and one that comes in blocks (`blocks.BlockUpdate`) is never held as a whole:

    for panels c of columns:  gx[:, c] = gy (W0 + Delta)[:, c],   dL/dDelta[:, c] = gy^T x[:, c]

Shapes: x [..., I], W0 and Delta [O,I], y [..., O].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import BlockUpdate, DeltaFn, WholeUpdate, assemble, check_shape, fold
from .precision import HALVES, no_autocast
from .scratch import Scratch


def merged_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    delta_fn: DeltaFn,
    params: Sequence[Tensor],
    *,
    folds: bool = True,
) -> Tensor:
    """y = x (W0 + Delta)^T + b in one product, with Delta recomputed in the backward pass.

    W0 + Delta is summed in the wider of both dtypes and rounded once to that of W0. Saved for the
    backward pass: x, a threshold, and by reference W0 and the params. Gradients reach x and the
    params, and weight and bias where they require them; the gradient of Delta is summed over the
    tokens in at least float32. Autocast lowers the product, never Delta. Under torch.compile the
    same formula runs without the recompute: the compiler decides itself what to keep.

    Beyond x, y and their gradients a pass holds one matrix [O, I] in the dtype of W0 (forward) or
    two [O, W] for a panel of W columns (backward, see `blocks.PANEL_COLUMNS`), what `delta_fn`
    holds for a block (see `blocks.BLOCK_ENTRIES`) and, forward, up to two float32 matrices of at
    most `select.WHOLE_ENTRIES` entries (on the CPU one, four times as large) for the threshold.

    Args:
        x: Input, [..., I], any strides.
        weight: W0, [O, I], float32, float64, bfloat16 or float16; None for x Delta^T alone.
        bias: [O] or None.
        delta_fn: params -> Delta [O, I]. Pure and deterministic: it runs in the forward pass and,
            when a gradient is wanted, once more in the backward pass. A `BlockUpdate` is built
            block by block.
        params: Every tensor Delta depends on and gradients shall reach.
        folds: Whether forward is one product. Else it is x W0^T + b + x Delta^T, for a 16-bit W0
            whose rounding would lose a small Delta. Gradients take one product either way.

    Returns:
        y, [..., O], in the dtype `F.linear(x, weight, bias)` has.
    """
    if torch.compiler.is_compiling():
        return _traced(x, weight, bias, delta_fn, params, folds)
    update = delta_fn if isinstance(delta_fn, BlockUpdate) else WholeUpdate(delta_fn, weight)
    y: Tensor = _MergedLinear.apply(update, folds, x, weight, bias, *params)
    return y


def delta_of(delta_fn: DeltaFn, params: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Delta, outside of autocast.

    Raises:
        ValueError: It is not shaped as the weight matrix [O, I].
    """
    with no_autocast(weight.device):
        return check_shape(delta_fn(*params), weight)


def _traced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    delta_fn: DeltaFn,
    params: Sequence[Tensor],
    folds: bool,
) -> Tensor:
    with no_autocast(x.device):
        delta = delta_fn(*params)
    if weight is None:
        return F.linear(x, delta.to(x.dtype), bias)
    if folds:
        return F.linear(x, fold(weight, check_shape(delta, weight)), bias)
    return F.linear(x, weight, bias) + F.linear(x, delta.to(x.dtype))


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        update: BlockUpdate,
        folds: bool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        added_to = weight if folds else None
        dtype = None if added_to is not None else _product_dtype(x)
        with no_autocast(x.device):
            scratch = Scratch()
            statistics, kept = update.measure(params, scratch)
            walk = update.walk(params, statistics, [False] * len(params), scratch, kept)
            matrix = assemble(update, params, walk, scratch, added_to, dtype)
        ctx.update, ctx.count = update, len(params)
        ctx.save_for_backward(x, weight, *params, *statistics)
        if weight is None or folds:
            return F.linear(x, matrix, bias)
        return F.linear(x, weight, bias).add_(F.linear(x, matrix))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        params, statistics = rest[: ctx.count], rest[ctx.count :]
        _, _, need_x, need_weight, need_bias, *need_params = ctx.needs_input_grad
        with no_autocast(x.device):
            scratch = Scratch()
            walk = ctx.update.walk(params, statistics, need_params, scratch)
            gx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
            gweight = torch.empty_like(weight) if need_weight else None
            products = _Products(gy, x, scratch)
            for panel, blocks in ctx.update.panels(params):
                gdelta = products.for_weight(panel) if need_weight or any(need_params) else None
                matrix = products.matrix(panel) if need_x else None
                for columns, local in blocks:
                    if matrix is None:
                        walk.delta(columns)
                    else:
                        base = None if weight is None else weight[:, columns]
                        walk.fold_into(matrix[:, local], columns, base, 1.0)
                    if gdelta is not None and any(need_params):
                        walk.pull(gdelta[:, local])
                if gx is not None and matrix is not None:
                    products.for_input(matrix, gx.view(-1, x.shape[-1])[:, panel])
                if gweight is not None and gdelta is not None:
                    gweight[:, panel] = gdelta
            gbias = products.gy.sum(0) if need_bias else None
        return None, None, gx, gweight, gbias, *walk.gradients()


class _Products:
    """The two products of a backward pass, a panel of columns at a time."""

    def __init__(self, gy: Tensor, x: Tensor, scratch: Scratch) -> None:
        self.gy, self._x = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
        self._scratch = scratch
        low = [t.dtype for t in (gy, x) if t.dtype in HALVES]
        # Sums of 16-bit products overflow, or lose digits, in 16 bits.
        self._accumulates = gy.is_cuda and bool(low)
        wide = torch.promote_types(torch.promote_types(gy.dtype, x.dtype), torch.float32)
        self._dtype = low[0] if self._accumulates else wide
        self._gy_transposed = self.gy.to(self._dtype).T

    def matrix(self, panel: slice) -> Tensor:
        """Room for (W0 + Delta)[:, panel], [O, W], in the dtype of gy; scratch."""
        shape = self.gy.shape[1], self._x[:1, panel].shape[1]
        return self._scratch.take("panel", shape, self.gy)

    def for_input(self, matrix: Tensor, out: Tensor) -> None:
        """out [T, W] = gy (W0 + Delta)[:, panel]."""
        if out.dtype == matrix.dtype:
            torch.mm(self.gy, matrix, out=out)
        else:
            out.copy_(self.gy @ matrix)

    def for_weight(self, panel: slice) -> Tensor:
        """gy^T x over all tokens, [O, W], in at least float32; scratch."""
        x, gy = self._x[:, panel].to(self._dtype), self._gy_transposed
        if self._accumulates:
            return torch.mm(gy, x, out_dtype=torch.float32)
        return torch.mm(gy, x, out=self._scratch.take("gdelta", (len(gy), x.shape[1]), x))


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a product with x runs in: the dtype of autocast, if that is on."""
    device = x.device.type
    lowered = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lowered else x.dtype
