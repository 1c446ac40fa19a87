"""Memory for one pass over an update, kept for the next one.

Systems take large blocks back at once when they are freed, and getting them again, page by page,
costs more than the arithmetic on them. On the CPU what a pass used goes to a small pool.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import at_hand

POOL_SIZE = 4  # sets of buffers kept: one for each adapter that passes at the same time
POOLED_ENTRIES = 2**22
"""Larger buffers are not kept, so that the pool holds some tens of megabytes at most."""

_pool: list[dict[str, Tensor]] = []


class Scratch:
    """Named memory, given back when the object goes.

    Args:
        pooled: Whether it may go to the pool: not if a tensor of it outlives the object.
    """

    def __init__(self, pooled: bool = True) -> None:
        self._pooled = pooled
        self._passing: dict[str, Tensor] = {}
        self._lasting: dict[str, Tensor] = _pool.pop() if pooled and _pool else {}
        self._parts: dict[int, Scratch] = {}

    def take(
        self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Uninitialised contiguous memory of any shape; what had the same name is lost."""
        size, dtype = math.prod(shape), dtype or like.dtype
        lasts = self._pooled and at_hand(like) and size <= POOLED_ENTRIES
        memory = self._lasting if lasts else self._passing
        flat = memory.get(name)
        if flat is None or len(flat) < size or flat.dtype != dtype:
            with torch.inference_mode(False):  # else unusable outside of it
                flat = memory[name] = torch.empty(size, dtype=dtype, device=like.device)
        return flat[:size].view(*shape)

    def part(self, index: int) -> "Scratch":
        """Memory of its own for one of several updates that are walked together."""
        if index not in self._parts:
            self._parts[index] = Scratch(self._pooled)
        return self._parts[index]

    def __del__(self) -> None:
        if self._lasting and len(_pool) < POOL_SIZE:
            _pool.append(self._lasting)


def release_scratch() -> None:
    """Give the pool's memory back to the system."""
    _pool.clear()
