"""A frozen Linear and its update as one matrix product, holding nothing but the input.

    y = x (W0 + Delta)^T + b,   Delta = delta_fn(*params)

The plain formulation keeps every [O,I] intermediate of Delta for the backward pass; here Delta is
built again there. Shapes: x [..., I], W0 and Delta [O,I], y [..., O].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import no_autocast

DeltaFn = Callable[..., Tensor]


def merged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta_fn: DeltaFn, params: Sequence[Tensor]
) -> Tensor:
    """y = x (W0 + Delta)^T + b in one product, with Delta recomputed in the backward pass.

    W0 + Delta is summed in the wider of both dtypes and rounded once to that of W0. Saved for the
    backward pass: x, and by reference W0 and the params. Gradients reach x and the params, and
    weight and bias where they require them; the gradient of Delta is summed over the tokens in at
    least float32. Autocast lowers the product, never Delta. Under torch.compile the same formula
    runs without the recompute: the compiler decides itself what to keep.

    Args:
        x: Input, [..., I], any strides.
        weight: W0, [O, I], float32, float64, bfloat16 or float16.
        bias: [O] or None.
        delta_fn: params -> Delta [O, I]. Pure and deterministic: it runs in the forward pass and,
            when a gradient is wanted, once more in the backward pass.
        params: Every tensor Delta depends on and gradients shall reach.

    Returns:
        y, [..., O], in the dtype `F.linear(x, weight, bias)` has.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, fold(weight, delta_of(delta_fn, params, weight)), bias)
    y: Tensor = _MergedLinear.apply(delta_fn, x, weight, bias, *params)
    return y


def delta_of(delta_fn: DeltaFn, params: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Delta, outside of autocast.

    Raises:
        ValueError: It is not shaped as the weight matrix [O, I].
    """
    with no_autocast(weight.device):
        delta = delta_fn(*params)
    if delta.shape != weight.shape:
        raise ValueError(
            f"delta_fn must return [O, I] = {list(weight.shape)}, got {list(delta.shape)}"
        )
    return delta


def fold(weight: Tensor, delta: Tensor) -> Tensor:
    """W0 + Delta [O, I], summed in the wider of both dtypes and rounded once to that of W0."""
    return (delta.contiguous() + weight).to(weight.dtype)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        delta_fn: DeltaFn,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        ctx.delta_fn = delta_fn
        ctx.save_for_backward(x, weight, *params)
        return F.linear(x, fold(weight, delta_of(delta_fn, params, weight)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *params = ctx.saved_tensors
        _, need_x, need_weight, need_bias, *need_params = ctx.needs_input_grad
        with no_autocast(x.device):
            leaves = [
                p.detach().requires_grad_(n) for p, n in zip(params, need_params, strict=True)
            ]
            with torch.set_grad_enabled(any(need_params)):
                delta = delta_of(ctx.delta_fn, leaves, weight)
            gx = gweight = None
            if need_x:
                gx = (gy @ fold(weight, delta.detach()).to(gy.dtype)).to(x.dtype)
            if need_weight or any(need_params):
                gweight = _weight_gradient(gy, x, transposed=delta.mT.is_contiguous())
            gbias = gy.reshape(-1, gy.shape[-1]).sum(0) if need_bias else None
            gparams = param_gradients(delta, leaves, gweight)
        gweight = gweight.to(weight.dtype) if need_weight and gweight is not None else None
        return None, gx, gweight, gbias, *gparams


def _weight_gradient(gy: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """gy^T x over all tokens, [O, I], in at least float32: sums of float16 products overflow.

    `transposed` lays it out like a Delta built as [I, O], which its backward pass reads faster.
    """
    gy, x = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
    if transposed:
        return _weight_gradient(x, gy, transposed=False).T
    low = next((t.dtype for t in (gy, x) if t.dtype in (torch.float16, torch.bfloat16)), None)
    if gy.is_cuda and low is not None:
        return torch.mm(gy.to(low).T, x.to(low), out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(gy.dtype, x.dtype), torch.float32)
    return gy.to(wide).T @ x.to(wide)


def param_gradients(
    delta: Tensor, leaves: Sequence[Tensor], gweight: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the params from that of Delta [O, I]; None where none is wanted."""
    wanted = [p for p in leaves if p.requires_grad]
    if not wanted or gweight is None:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(delta, wanted, gweight.to(delta.dtype), allow_unused=True))
    return [next(found) if p.requires_grad else None for p in leaves]
