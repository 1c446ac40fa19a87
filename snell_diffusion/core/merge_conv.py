"""A frozen convolution and its update as one convolution, holding nothing but the input.

    y = x * view(W0 + Delta) + b,   W0 and Delta [O, I/g kh kw], one row per output channel

Kernels [O, I/g, kh, kw] are a matrix whose rows are flattened kernels, and the update is what it
would be for a Linear of that size. As there, Delta is built again in the backward pass.
Shapes: x [B, I, h, w], y [B, O, h', w'], g groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from .blocks import DeltaFn, fold, param_gradients
from .merge import delta_of
from .precision import HALVES, no_autocast


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves: all of (vertical, horizontal), padding with zeros."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of `F.conv2d`, after the bias."""
        return self.stride, self.padding, self.dilation, self.groups


def merged_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta_fn: DeltaFn,
    params: Sequence[Tensor],
    geometry: Geometry,
) -> Tensor:
    """y = x * view(W0 + Delta) + b in one convolution, with Delta recomputed in the backward pass.

    As `merge.merged_linear`: one rounding of the sum, gradients to x, the params, and weight and
    bias where they require them, the gradient of Delta in at least float32.

    Args:
        x: Input, [B, I, h, w]; other paddings than zeros are applied before.
        weight: W0, [O, I/g, kh, kw], float32, float64, bfloat16 or float16.
        bias: [O] or None.
        delta_fn: params -> Delta [O, I/g kh kw]. Pure and deterministic.
        params: Every tensor Delta depends on and gradients shall reach.
        geometry: Stride, padding, dilation, groups.

    Returns:
        y, [B, O, h', w'], in the dtype `F.conv2d(x, weight, bias)` has.
    """
    if torch.compiler.is_compiling():
        kernels = fold_kernels(weight, delta_of(delta_fn, params, weight.flatten(1)))
        return F.conv2d(x, kernels, bias, *geometry.arguments)
    y: Tensor = _MergedConv2d.apply(delta_fn, geometry, x, weight, bias, *params)
    return y


def fold_kernels(weight: Tensor, delta: Tensor) -> Tensor:
    """W0 [O, I/g, kh, kw] + Delta [O, I/g kh kw], shaped as W0, rounded once to its dtype."""
    return fold(weight.flatten(1), delta).view_as(weight)


class _MergedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        delta_fn: DeltaFn,
        geometry: Geometry,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        ctx.delta_fn, ctx.geometry = delta_fn, geometry
        ctx.save_for_backward(x, weight, *params)
        kernels = fold_kernels(weight, delta_of(delta_fn, params, weight.flatten(1)))
        return F.conv2d(x, kernels, bias, *geometry.arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *params = ctx.saved_tensors
        _, _, need_x, need_weight, need_bias, *need_params = ctx.needs_input_grad
        arguments = ctx.geometry.arguments
        gx = gweight = None
        with no_autocast(x.device):
            leaves = [
                p.detach().requires_grad_(n) for p, n in zip(params, need_params, strict=True)
            ]
            with torch.set_grad_enabled(any(need_params)):
                delta = delta_of(ctx.delta_fn, leaves, weight.flatten(1))
            if need_x:
                kernels = fold_kernels(weight, delta.detach()).to(gy.dtype)
                gx = conv2d_input(x.shape, kernels, gy.contiguous(), *arguments).to(x.dtype)
            if need_weight or any(need_params):
                wide = torch.promote_types(torch.promote_types(gy.dtype, x.dtype), torch.float32)
                # Rounded to what autocast multiplied; summed wide, since sums in 16 bits overflow.
                seen = x.to(gy.dtype) if gy.dtype in HALVES else x
                gweight = conv2d_weight(seen.to(wide), weight.shape, gy.to(wide), *arguments)
            gbias = gy.sum((0, 2, 3)) if need_bias else None
            gparams = param_gradients(
                delta, leaves, None if gweight is None else gweight.flatten(1)
            )
        gweight = gweight.to(weight.dtype) if need_weight and gweight is not None else None
        return None, None, gx, gweight, gbias, *gparams
