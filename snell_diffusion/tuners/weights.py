"""Base weights and updates: what rounding loses of their sum, and which bases allow it.

Weights and updates are (O, I) = (out features, in features).
"""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from snell_diffusion.core.precision import HALVES

__all__ = [
    "HALVES",
    "TOLERATED_LOSS",
    "device_of",
    "fingerprint",
    "has_plain_weight",
    "is_linear_like",
    "is_plain",
    "lowered_to",
    "realised_error",
    "untouched",
]

FLOATS = (torch.float64, torch.float32, *HALVES)
TOLERATED_LOSS = 0.05
"""Share of an update (Frobenius norms) that rounding W0 + ΔW may lose: above it fusing warns, and
an update is not folded into a 16-bit base unless that is asked for."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Two int64 that change with the content: the XOR of all bits, and the bits of the sum.

    XOR alone is blind where an even number of entries change alike.
    """
    tensor = tensor.detach()
    total = tensor.sum(dtype=torch.float64)
    return torch.stack([torch.hash_tensor(tensor).view(torch.int64), total.view(torch.int64)])


def realised_error(weight: Tensor, merged: Tensor, delta: Tensor) -> float:
    """|merged - weight - ΔW| / |ΔW| in Frobenius norms, 0.0 where ΔW is zero."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    norm = torch.linalg.vector_norm(delta)
    off = torch.linalg.vector_norm(merged.to(wide) - weight.to(wide) - delta)
    return float(off / norm) if norm > 0 else 0.0


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module maps [..., I] to [..., O] as a Linear does, however it keeps its weight.

    That is an `nn.Linear`, all its subclasses among them, or a module with whole numbers
    `in_features` and `out_features`: quantization packages pack or rename the weight.
    """
    if isinstance(module, nn.Linear):
        return True
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(type(size) is int for size in sizes)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's weight is, or under whatever name it keeps one."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight.device
    tensors = (*layer.parameters(), *layer.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether the weight is floats as they stand: not quantized, packed, renamed or sharded."""
    weight: Tensor | None = getattr(layer, "weight", None)
    # Fake tensors stand for plain ones where memory is computed from shapes.
    if weight is None or type(weight) not in (nn.Parameter, Tensor, FakeTensor):
        return False
    return weight.dtype in FLOATS and weight.ndim == (4 if isinstance(layer, nn.Conv2d) else 2)


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is exactly `kind` on its weight: no wrapper, hook or patch."""
    return (
        isinstance(layer, kind)
        and type(layer).forward is kind.forward
        and untouched(layer)
        and has_plain_weight(layer)
    )


def untouched(layer: nn.Module) -> bool:
    """Whether a module has no hooks and runs its class's own forward."""
    own = layer.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return False
    # Hooks that are taken off again leave the class's own method behind on the instance.
    forward = own.get("forward")
    return forward is None or getattr(forward, "__func__", forward) is type(layer).forward


def lowered_to(device: str) -> torch.dtype | None:
    """The 16-bit dtype that autocast lowers products to on a kind of device; None without it."""
    if not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return dtype if dtype in HALVES else None
