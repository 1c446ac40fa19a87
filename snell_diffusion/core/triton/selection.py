"""Exact order statistics of |w| for G layers, on the device, in memory of one histogram a layer.

A sample brackets the level's quantile; one count over all entries confirms the bracket and narrows
it to one of 2048 cells, further counts narrow the cell to one bit pattern. A bracket that misses
costs one count: an interval of any width takes three, so four are always enough. Counts that come
after the end return at once. Nothing of this is known to the host.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import passes
from .launch import blocks, launch

if TYPE_CHECKING:
    from .ops import Group

COUNTS = 4
CHUNK = 512  # outputs a program goes over: its three totals take an atomic operation each
SAMPLE_FROM = 2**16  # entries; below, a whole count costs less than a sample
SAMPLE_EDGE, SAMPLE_TILES = 16, 64


class Search(NamedTuple):
    """State of the search of each layer, [G], and the histogram, [G, 2048]."""

    low: Any  # first bit pattern of the interval
    shift: Any  # a cell holds 2^shift bit patterns
    rank: Any  # from 0, ascending
    done: Any
    cells: Any
    below: Any  # entries below the interval
    following: Any  # smallest bit pattern above it
    largest: Any  # of all
    value: Any  # bit patterns of the rank, and of the one after it
    next_value: Any


def thresholds(group: "Group", levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantile of |w| at each layer's level, as `sparsify.threshold` defines it.

    Args:
        group: The layers, see `ops.prepare`.
        levels: Share of zeros, [G] float64 on the group's device, 0 to 1.

    Returns:
        Thresholds [G] float32, and [G] float32 that is 1 where a matrix is zero everywhere, else 0.
    """
    entries = group.size.I * group.size.O
    position = levels.double() * (entries - 1)
    rank = position.long()
    search = _begin(group, levels, rank)
    config = blocks(group.H, group.q)
    grid = triton.cdiv(group.size.I, config["BI"]) * triton.cdiv(group.size.O, CHUNK)
    for _ in range(COUNTS):
        launch(
            passes.count,
            (grid, group.G),
            group.device,
            *(group.points, group.mixers, search, group.size, *group.shape),
            CHUNK=CHUNK,
            **config,
        )
        launch(passes.select, (group.G,), group.device, search, entries)
    low, high = search.value.view(torch.float32), search.next_value.view(torch.float32)
    t = torch.lerp(low, high, (position - rank).float())
    return t, (search.largest == 0).float()


def _begin(group: "Group", levels: Tensor, rank: Tensor) -> Search:
    def filled(value: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((group.G,), value, dtype=dtype, device=group.device)

    low, shift = filled(0), filled(31 - passes.CELL_BITS.value)
    if group.size.I * group.size.O > SAMPLE_FROM and min(group.size) >= SAMPLE_EDGE:
        guess = _sample(group)
        launch(passes.bracket, (group.G,), group.device, guess, levels, low, shift, guess.shape[1])
    cells = torch.zeros(group.G, passes.CELLS.value, dtype=torch.int32, device=group.device)
    return Search(
        low=low,
        shift=shift,
        rank=rank,
        done=filled(0),
        cells=cells,
        below=filled(0, torch.int64),
        following=filled(passes.LAST.value),
        largest=filled(0),
        value=filled(0),
        next_value=filled(0),
    )


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
