"""Stand-ins for quantized Linear layers: as many bytes, and the same temporaries."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Bytes per weight: nf4 with blocks of 64 whose scales are 8-bit themselves; one scale per row else.
_BYTES = {"bnb_nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "bnb_int8": 1.0}
_BYTES |= {"torchao_int8": 1.0, "torchao_fp8": 1.0}


class _Dequantized(torch.autograd.Function):
    """x W^T with W unpacked for the product only, in the backward pass again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        return gy @ gy.new_empty(ctx.shape), None, None


class PackedLinear(nn.Linear):
    """A frozen Linear whose weight takes the bytes that it takes quantized."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        size = int(linear.weight.numel() * _BYTES[kind]) + 4 * linear.out_features
        packed = torch.empty(size, 1, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self._dtype = linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        y: Tensor = _Dequantized.apply(x.to(self._dtype), self.bias, shape)
        return y


def pack(model: nn.Module, kind: str) -> None:
    """Replace every Linear of a model by its stand-in; kind "none" leaves it alone."""
    if kind == "none":
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, kind))
