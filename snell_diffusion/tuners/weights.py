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
    "fingerprint",
    "has_plain_weight",
    "is_plain",
    "realised_error",
]

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float64, torch.float32, *HALVES)


def fingerprint(tensor: Tensor) -> Tensor:
    """Two int64 that change with the content: the XOR of all bits, and the bits of the sum.

    XOR alone is blind where an even number of entries change alike.
    """
    tensor = tensor.detach()
    total = tensor.sum(dtype=torch.float64)
    return torch.stack([torch.hash_tensor(tensor).view(torch.int64), total.view(torch.int64)])


@dataclass(frozen=True)
class Merged:
    """What `unmerge` needs: the weight before, a fingerprint of it after, the scales merged."""

    original: Tensor
    written: Tensor
    scales: dict[str, float]


@dataclass(frozen=True)
class CachedDelta:
    """The summed update of the active adapters, valid while nothing it came from has changed."""

    delta: Tensor
    sources: tuple[Tensor, ...]
    scales: tuple[tuple[str, float], ...]
    versions: tuple[int, ...]
    contents: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, delta: Tensor, sources: Sequence[Tensor], scales: tuple[tuple[str, float], ...]
    ) -> "CachedDelta":
        return cls(delta, tuple(sources), scales, *cls._state(sources))

    @staticmethod
    def _state(sources: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        # Fused optimizers change parameters without counting versions.
        contents = tuple(fingerprint(tensor) for tensor in sources if tensor.requires_grad)
        return tuple(tensor._version for tensor in sources), contents

    def fits(self, sources: Sequence[Tensor], scales: tuple[tuple[str, float], ...]) -> bool:
        if self.scales != scales or len(self.sources) != len(sources):
            return False
        if any(old is not new for old, new in zip(self.sources, sources, strict=True)):
            return False
        versions, contents = self._state(sources)
        if self.versions != versions or len(self.contents) != len(contents):
            return False
        return not contents or torch.equal(torch.stack(self.contents), torch.stack(contents))


def realised_error(weight: Tensor, merged: Tensor, delta: Tensor) -> float:
    """|merged - weight - ΔW| / |ΔW| in Frobenius norms, 0.0 where ΔW is zero."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    norm = torch.linalg.vector_norm(delta)
    off = torch.linalg.vector_norm(merged.to(wide) - weight.to(wide) - delta)
    return float(off / norm) if norm > 0 else 0.0


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether the weight is floats as they stand: not quantized, packed or sharded."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    axes = 4 if isinstance(layer, nn.Conv2d) else 2
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS and weight.ndim == axes


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is exactly `kind` on its weight: no wrapper, hook or patch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return bool(
        isinstance(layer, kind)
        and type(layer).forward is kind.forward
        and "forward" not in vars(layer)
        and not any(getattr(layer, name) for name in hooks)
        and has_plain_weight(layer)
    )
