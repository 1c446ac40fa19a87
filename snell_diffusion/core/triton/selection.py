"""Exact order statistics of |w| for G layers, on the device, in memory of one histogram a layer.

A sample brackets the level's quantile; one count over all entries confirms the bracket and narrows
it to one of 2048 cells, further counts narrow the cell to one bit pattern. A bracket that misses
costs one count: an interval of any width takes three, so four are always enough. Counts that come
after the end return at once. Nothing of this is known to the host.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import passes
from .launch import launch

if TYPE_CHECKING:
    from .ops import Group

COUNTS = 4
SAMPLE_FROM = 2**16  # entries; below, a whole count costs less than a sample
SAMPLE_EDGE, SAMPLE_TILES = 16, 64


class Search(NamedTuple):
    """State of the search of each layer, [G], and the histogram, [G, CELLS]."""

    low: Any  # first bit pattern of the interval
    shift: Any  # a cell holds 2^shift bit patterns
    done: Any
    following: Any  # smallest bit pattern above the interval
    largest: Any  # of all
    value: Any  # bit patterns of the rank, and of the one after it
    next_value: Any
    rank: Any  # from 0, ascending
    below: Any  # entries below the interval
    fraction: Any  # of the way from the rank to the next, float32
    cells: Any

    @classmethod
    def empty(cls, G: int, device: torch.device) -> "Search":
        low, shift, done, following, largest, value, next_value = torch.empty(
            7, G, dtype=torch.int32, device=device
        ).unbind()
        rank, below = torch.empty(2, G, dtype=torch.int64, device=device).unbind()
        fraction = torch.empty(G, dtype=torch.float32, device=device)
        cells = torch.empty(G, passes.CELLS.value, dtype=torch.int32, device=device)
        bits = (low, shift, done, following, largest, value, next_value)
        return cls(*bits, rank, below, fraction, cells)


def thresholds(group: "Group", levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantile of |w| at each layer's level, as `sparsify.threshold` defines it.

    Args:
        group: The layers, see `ops.prepare`.
        levels: Share of zeros, [G] float64 on the group's device, 0 to 1.

    Returns:
        Thresholds [G] float32, and [G] float32 that is 1 where a matrix is zero everywhere, else 0.

    Raises:
        ValueError: levels are not as described.
        LaunchError: a kernel cannot be compiled or started.
    """
    if levels.shape != (group.G,) or levels.dtype != torch.float64:
        raise ValueError(
            f"levels must be {group.G} float64 numbers, one a layer, "
            f"got {list(levels.shape)} {levels.dtype}"
        )
    entries = group.size.I * group.size.O
    search = Search.empty(group.G, group.device)
    sampled = entries > SAMPLE_FROM and min(group.size) >= SAMPLE_EDGE
    sample = _sample(group) if sampled else None
    width = sample.shape[1] if sample is not None else 0
    launch(passes.begin, (group.G,), group.device, search, levels, entries, sample, width)
    config, (blocks, parts, span) = group.blocks, group.strips("I")
    for _ in range(COUNTS):
        launch(
            passes.count,
            (blocks, group.G, parts),
            group.device,
            *(group.points, group.mixers, search, group.size, span, *group.shape),
            **config,
        )
        launch(passes.select, (group.G,), group.device, search, entries)
    low, high = search.value.view(torch.float32), search.next_value.view(torch.float32)
    return torch.lerp(low, high, search.fraction), (search.largest == 0).float()


def _sample(group: "Group") -> Tensor:
    """Bit patterns of some magnitudes of each layer, [G, S], ascending."""
    size = SAMPLE_TILES * SAMPLE_EDGE**2
    bits = torch.empty(group.G, size, dtype=torch.int32, device=group.device)
    launch(
        passes.sample,
        (SAMPLE_TILES, group.G),
        group.device,
        *(group.points, group.mixers, bits, group.size, SAMPLE_TILES, *group.shape),
        EDGE=SAMPLE_EDGE,
        num_warps=1,
    )
    return bits.sort(1).values
