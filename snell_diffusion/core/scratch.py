"""Memory for one pass over an update, kept for the next one.

Systems take large blocks back at once when they are freed, and getting them again, page by page,
costs more than the arithmetic on them. On the CPU what a pass used goes to a small pool.
"""

import math

import torch
from torch import Tensor

from .precision import at_hand

POOL_SIZE = 4  # sets of buffers kept: one for each adapter that passes at the same time
POOLED_ENTRIES = 2**22
"""Larger buffers are not kept, so that the pool holds some tens of megabytes at most."""

VIEWS = 256  # shapes remembered of a set of buffers, far more than models have


class _Memory:
    """Buffers by name, and the views of them that were asked for."""

    def __init__(self) -> None:
        self.flat: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}


_pool: list[_Memory] = []


class Scratch:
    """Named memory, given back when the object goes. For tensors of one device.

    Args:
        pooled: Whether it may go to the pool: not if a tensor of it outlives the object.
    """

    def __init__(self, pooled: bool = True) -> None:
        self._pooled = pooled
        self._passing = _Memory()
        self._lasting = _pool.pop() if pooled and _pool else _Memory()
        self._parts: dict[int, Scratch] = {}

    def take(
        self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Uninitialised contiguous memory of any shape; what had the same name is lost."""
        lasts = self._pooled and at_hand(like)  # each time: a walk may hold real and fake tensors
        key = name, shape, dtype or like.dtype
        found = self._lasting.views.get(key) if lasts else None
        if found is None:
            return self._make(*key, like.device, lasts)
        return found.view(shape)  # an operation, so that it is fake where others are

    def _make(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        lasts: bool,
    ) -> Tensor:
        size = math.prod(shape)
        lasts = lasts and size <= POOLED_ENTRIES
        memory = self._lasting if lasts else self._passing
        flat = memory.flat.get(name)
        with torch.inference_mode(False):  # else unusable outside of it
            if flat is None or len(flat) < size or flat.dtype != dtype:
                flat = memory.flat[name] = torch.empty(size, dtype=dtype, device=device)
                memory.views.clear()  # they would keep what was replaced
            view = flat[:size].view(*shape)
        if lasts and type(view) is Tensor and len(memory.views) < VIEWS:
            memory.views[name, shape, dtype] = view
        return view

    def part(self, index: int) -> "Scratch":
        """Memory of its own for one of several updates that are walked together."""
        if index not in self._parts:
            self._parts[index] = Scratch(self._pooled)
        return self._parts[index]

    def __del__(self) -> None:
        if self._lasting.flat and len(_pool) < POOL_SIZE:
            _pool.append(self._lasting)


def release_scratch() -> None:
    """Give the pool's memory back to the system."""
    _pool.clear()
