"""Counter-based randomness: every draw is a function of (seed, purpose, counters) alone.

No generator is carried from one step to the next, so a run that stops and resumes, or that skips
its validation pictures, draws exactly what an uninterrupted run draws. Ranks are not a counter:
sample `i` of a global batch gets the same noise however many processes share the batch.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def seed_for(seed: int, purpose: str, *counters: int) -> int:
    """Hash (seed, purpose, counters) to a seed, 0 to 2**63 - 1: SHA-256, the same everywhere."""
    key = "/".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Return a fresh CPU generator for one purpose, e.g. `generator(0, "noise", step, i)`."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *counters))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *counters: int) -> Tensor:
    """Standard normal float32 CPU tensor of `shape`, a function of its arguments only."""
    return torch.randn(shape, generator=generator(seed, purpose, *counters))


def seed_torch(seed: int, purpose: str, *counters: int) -> None:
    """Seed torch's global generators, which dropout inside a model draws from."""
    torch.manual_seed(seed_for(seed, purpose, *counters))


@lru_cache(maxsize=8)
def _order(seed: int, purpose: str, epoch: int, size: int) -> tuple[int, ...]:
    shuffled = torch.randperm(size, generator=generator(seed, purpose, epoch))
    return tuple(shuffled.tolist())


def item_at(position: int, size: int, seed: int, purpose: str = "order") -> int:
    """Index of the item that stands at `position` of an endless shuffled stream over `size` items.

    Every epoch (block of `size` positions) holds each item once, in its own order.

    Raises:
        ValueError: `size` is not positive or `position` is negative.
    """
    if size < 1 or position < 0:
        raise ValueError(f"need size >= 1 and position >= 0, got size {size}, position {position}")
    epoch, offset = divmod(position, size)
    return _order(seed, purpose, epoch, size)[offset]
