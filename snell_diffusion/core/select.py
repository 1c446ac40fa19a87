"""Order statistics of magnitudes, exact and without a sort.

On the CPU numpy partitions small matrices. For others a sample brackets the ranks wanted: one pass
counts what lies below the bracket and picks out the few per cent inside, which are then selected
from. Where matrices are too large to be held,
or reading a number back would stall a device, three passes over blocks count the bits instead:
non-negative float32 numbers sort as their bit patterns do, so 11, 10 and 10 bits pin a rank down,
with a few thousand counters.
"""

import math
import platform
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .precision import at_hand

WHOLE_ENTRIES = 2**23
"""Matrices above this many entries are selected from by passes over blocks, those below as a whole
(4 bytes an entry, on most devices twice). Where numbers are at hand the limit is `AT_HAND` times
as high: one matrix is held there, which becomes the weight, and passes cost more than memory."""
AT_HAND = 4

# Here numpy partitions by vector instructions: twice as fast as a bracket, elsewhere four times as
# slow. Above so many entries the copy that is partitioned would be a second large matrix.
_VECTORISED = platform.machine().lower() in ("x86_64", "amd64")
_PARTITIONED = 2**22

_PIECE = 2**16  # entries that are looked at together: they stay in the cache
_SAMPLE = 2**13
_MARGIN = 0.03  # of the ranks; five standard deviations of a sample quantile are 0.028

_DIGITS = ((20, 11), (10, 10), (0, 10))  # first bit and number of bits of each pass


def streamed_quantile(
    blocks: Callable[[], Iterable[Tensor]], size: int, sparsity: float, device: torch.device
) -> Tensor:
    """The quantile `sparsify.threshold` defines, from passes over blocks of |w|.

    Args:
        blocks: Starts a pass: contiguous float32 tensors of any shape, `size` entries in all, the
            same at each call.
        size: Entries, 1 or more.
        sparsity: Level, 0 to 1.
        device: Where the blocks are.

    Returns:
        0-d float32.
    """
    position = sparsity * (size - 1)
    rank = math.floor(position)
    ranks = torch.tensor([rank, min(rank + 1, size - 1)], device=device)
    prefix = torch.zeros(2, dtype=torch.int32, device=device)
    for first, width in _DIGITS:
        counts = torch.zeros(2, 2**width, dtype=torch.int64, device=device)
        for block in blocks():
            _count(block.flatten().view(torch.int32), first, width, prefix, counts)
        below = counts.cumsum(1)
        digit = (below <= ranks.unsqueeze(1)).sum(1, keepdim=True)
        ranks = ranks - (below.gather(1, digit) - counts.gather(1, digit)).squeeze(1)
        prefix = (prefix << width) + digit.squeeze(1).int()
    low, high = prefix.view(torch.float32)
    return torch.lerp(low, high, position - rank)


def _count(bits: Tensor, first: int, width: int, prefix: Tensor, counts: Tensor) -> None:
    """Add to counts [2, 2^width] the digits of the entries whose higher bits are a prefix [2]."""
    digits = bits >> first
    if at_hand(bits):
        for row, wanted in zip(counts, prefix.tolist(), strict=True):
            of_prefix = digits - (wanted << width)
            inside = of_prefix[(of_prefix >= 0) & (of_prefix < 2**width)]
            row += torch.bincount(inside, minlength=2**width)
        return
    for j in range(2):  # fixed shapes: the number of entries inside is not known here
        of_prefix = digits - (prefix[j] << width)
        inside = (of_prefix >= 0) & (of_prefix < 2**width)
        counts[j].index_add_(0, of_prefix.clamp(0, 2**width - 1), inside.long())


def neighbours(w: NDArray[Any], rank: int) -> tuple[float, float]:
    """The magnitudes of rank `rank` and `rank + 1` (from 0, ascending; the last rank twice).

    Args:
        w: Signed entries, one-dimensional; left as they are.
        rank: 0 to len(w) - 1.
    """
    if len(w) > (_PARTITIONED if _VECTORISED else 4 * _SAMPLE):
        sample = np.abs(w[:: len(w) // _SAMPLE | 1])
        at, reach = rank / (len(w) - 1) * (len(sample) - 1), _MARGIN * len(sample)
        ends = max(0, math.floor(at - reach)), min(len(sample) - 1, math.ceil(at + reach))
        sample.partition(ends)
        found = _inside(w, rank, *sample[list(ends)])
        if found is not None:
            return found
    return _of(np.abs(w), rank)


def _inside(w: NDArray[Any], rank: int, low: Any, high: Any) -> tuple[float, float] | None:
    """`neighbours` if both lie in [low, high], else None."""
    below, candidates = 0, []
    buffer = np.empty(min(_PIECE, len(w)), w.dtype)
    for start in range(0, len(w), _PIECE):
        piece = np.abs(w[start : start + _PIECE], out=buffer[: len(w) - start])
        too_low = piece < low
        below += int(np.count_nonzero(too_low))
        candidates.append(piece[(piece <= high) ^ too_low])
    inside = np.concatenate(candidates)
    rank -= below
    if rank < 0 or rank + 1 >= len(inside):
        return None
    return _of(inside, rank)


def _of(a: NDArray[Any], rank: int) -> tuple[float, float]:
    a.partition(rank)
    return a[rank], a[min(rank + 1, len(a) - 1) :].min()
