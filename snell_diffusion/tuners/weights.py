"""Base weights and updates: what rounding loses of their sum, and which bases allow it.

Weights and updates are (O, I) = (out features, in features).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "HALVES",
    "CachedDelta",
    "Merged",
    "has_plain_weight",
    "is_plain_linear",
    "realised_error",
]

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float64, torch.float32, *HALVES)


@dataclass(frozen=True)
class Merged:
    """What `unmerge` needs: the weight before, a hash of the weight after, the scales merged."""

    original: Tensor
    written: Tensor
    scales: dict[str, float]


@dataclass(frozen=True)
class CachedDelta:
    """The summed update of the active adapters, valid while nothing it came from has changed."""

    delta: Tensor
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    scales: tuple[tuple[str, float], ...]

    def fits(self, sources: Sequence[Tensor], scales: tuple[tuple[str, float], ...]) -> bool:
        return (
            self.scales == scales
            and len(self.sources) == len(sources)
            and all(old is new for old, new in zip(self.sources, sources, strict=True))
            and self.versions == tuple(tensor._version for tensor in sources)
        )


def realised_error(weight: Tensor, merged: Tensor, delta: Tensor) -> float:
    """|merged - weight - ΔW| / |ΔW| in Frobenius norms, 0.0 where ΔW is zero."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    norm = torch.linalg.vector_norm(delta)
    off = torch.linalg.vector_norm(merged.to(wide) - weight.to(wide) - delta)
    return float(off / norm) if norm > 0 else 0.0


def has_plain_weight(linear: nn.Linear) -> bool:
    """Whether the weight is a matrix of floats as it stands: not quantized, packed or sharded."""
    weight = linear.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS and weight.ndim == 2


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer is exactly `F.linear` on its weight: no wrapper, hook or patch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return bool(
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and "forward" not in vars(layer)
        and not any(getattr(layer, name) for name in hooks)
        and has_plain_weight(layer)
    )
