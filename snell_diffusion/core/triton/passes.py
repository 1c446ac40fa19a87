"""Forward passes over G layers of one shape: centre, statistics, sample, count, select, write.

Axis 0 of the programs are blocks of rows, or tiles, of one layer, axis 1 is the layer; along axis 2
`span` outputs each are shared out where there are too few blocks to keep a GPU busy. A program
rebuilds its tiles of w from the points; nothing of the size of a weight is read or written but W0
and the result.
"""

import triton
import triton.language as tl

from .formulas import kernel, mix, rule_value, tile_of

LAST = tl.constexpr(0x7FFFFFFF)  # largest bit pattern of a magnitude; a NaN's
CELL_BITS = tl.constexpr(11)  # of 31 in a magnitude: any interval is resolved in three counts
CELLS = tl.constexpr(1 << 11)
WORTH = tl.constexpr(1024.0)  # independent entries


@triton.jit
def shift_rows(given, moved, norms, mean, head, n, N, q: tl.constexpr, Q: tl.constexpr):
    """Rows n of a head: moved = given - mean, filled up with zeros to Q columns; |moved|^2."""
    k = tl.arange(0, Q)[None, :]
    real = (n < N)[:, None] & (k < q)
    row = tl.load(given + (head * N + n)[:, None] * q + k, mask=real, other=0.0) - mean[None, :]
    tl.store(moved + (head * N + n)[:, None] * Q + k, row, mask=(n < N)[:, None])
    tl.store(norms + head * N + n, tl.sum(row * row, 1), mask=n < N)


@triton.jit
def centre(A, B, p, size, q: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr):
    """Points of `p` from A [G, H, I, q] and B [G, H, O, q]: a common shift keeps distances.

    Axis 1 is layer and head. Each program sums up all of B again: that costs less than a launch.
    """
    head = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, Q)[None, :]
    total = tl.zeros([Q], tl.float32)
    for start in range(0, size.O, ROWS):
        o = (start + tl.arange(0, ROWS))[:, None]
        at = B + (head * size.O + o) * q + k
        total += tl.sum(tl.load(at, mask=(o < size.O) & (k < q), other=0.0), 0)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    shift_rows(A, p.a, p.a_norm, total / size.O, head, n, size.I, q, Q)
    shift_rows(B, p.b, p.b_norm, total / size.O, head, n, size.O, q, Q)


@triton.jit
def row_statistics(
    p, gamma, lse, size, span, H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """lse[part,g,i] = log sum_o exp(K / gamma): running maximum and sum over tiles of outputs."""
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    peak = tl.full([BI], float("-inf"), tl.float32)
    total = tl.zeros([BI], tl.float32)
    first = tl.program_id(2) * span
    for start in range(first, tl.minimum(first + span, size.O), BO):
        o = start + tl.arange(0, BO)
        z = kernel(p, g, o, i, size, H, q, Q) / tl.load(gamma + g)
        z = tl.where((o < size.O)[:, None], z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[None, :]), 0)
        peak = higher
    part = tl.program_id(2) * tl.num_programs(1) + g
    tl.store(lse + part * size.I + i, peak + tl.log(total), mask=i < size.I)


@triton.jit
def magnitude_bits(p, mixers, g, o, i, size, H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr):
    """|w| as the integer of its bit pattern, which orders magnitudes; NaN comes last."""
    w = mix(kernel(p, g, o, i, size, H, q, Q), mixers, g, i, size)
    return w.to(tl.int32, bitcast=True) & LAST


@triton.jit
def sample(
    p, mixers, bits, size, tiles, H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """bits[g, tile, :]: small tiles spread evenly over rows and columns, to guess a quantile from.

    Tile s starts at the fractions s phi and s phi^2 of a sequence that fills the square evenly.
    """
    s, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    u, v = (s + 0.5) * 0.7548776662, (s + 0.5) * 0.5698402910
    i = ((u - tl.floor(u)) * (size.I - EDGE)).to(tl.int32) + tl.arange(0, EDGE)
    o = ((v - tl.floor(v)) * (size.O - EDGE)).to(tl.int32) + tl.arange(0, EDGE)
    found = magnitude_bits(p, mixers, g, o, i, size, H, q, Q)
    at = tl.arange(0, EDGE)[:, None] * EDGE + tl.arange(0, EDGE)[None, :]
    tl.store(bits + (g * tiles + s) * EDGE * EDGE + at, found)


@triton.jit
def begin(search, levels, entry_count, sample, S):
    """State of the search before the first count.

    The first interval is everything, or around the level's place in a sorted sample [G, S] of bit
    patterns. The margin is three standard errors of as many independent entries as the sample is
    worth: its tiles share rows and columns, and distances to one point go together.
    """
    g = tl.program_id(0)
    level = tl.load(levels + g)
    position = level * (entry_count - 1)
    rank = position.to(tl.int64)
    tl.store(search.rank + g, rank)
    tl.store(search.fraction + g, (position - rank).to(tl.float32))
    start = tl.zeros([], tl.int32)
    end = tl.full([], LAST, tl.int32)
    if sample is not None:
        short = level.to(tl.float32)
        margin = 3.0 * tl.sqrt(short * (1.0 - short) / WORTH) + 1.0 / WORTH
        first = tl.floor((short - margin) * S).to(tl.int32)
        last = tl.ceil((short + margin) * S).to(tl.int32)
        start = tl.where(first < 0, start, tl.load(sample + g * S + tl.maximum(first, 0)))
        end = tl.where(last >= S, end, tl.load(sample + g * S + tl.minimum(last, S - 1)))
    width = end.to(tl.int64) - start + 1
    cells = tl.full([32], CELLS, tl.int64) << tl.arange(0, 32).to(tl.int64)
    tl.store(search.low + g, start)
    tl.store(search.shift + g, tl.sum((cells < width).to(tl.int32), 0))
    tl.store(search.done + g, 0)
    tl.store(search.largest + g, 0)
    reset(search, g)


@triton.jit
def reset(search, g):
    """Counters before a count."""
    cell = tl.arange(0, CELLS)
    tl.store(search.cells + g * CELLS + cell, tl.zeros([CELLS], tl.int32))
    tl.store(search.below + g, tl.zeros([], tl.int64))
    tl.store(search.following + g, LAST)


@triton.jit
def count(
    p, mixers, search, size, span, H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Histogram of |w| in CELLS cells of 2^shift bit patterns from `low` on, and what lies outside.

    Atomics on integers alone: their order cannot change the result. An interval that holds few of
    the entries, as the sampled one does, keeps them rare.
    """
    g = tl.program_id(1).to(tl.int64)
    if tl.load(search.done + g) == 0:
        low, shift = tl.load(search.low + g), tl.load(search.shift + g)
        i = tl.program_id(0) * BI + tl.arange(0, BI)
        first = tl.program_id(2) * span
        below = tl.zeros([BI], tl.int32)
        following = tl.full([BI], LAST, tl.int32)
        largest = tl.zeros([BI], tl.int32)
        for start in range(first, tl.minimum(first + span, size.O), BO):
            o = start + tl.arange(0, BO)
            real = (o < size.O)[:, None] & (i < size.I)[None, :]
            bits = magnitude_bits(p, mixers, g, o, i, size, H, q, Q)
            cell = (bits - low) >> shift
            inside = real & (bits >= low) & (cell < CELLS)
            tl.atomic_add(search.cells + g * CELLS + cell, 1, mask=inside, sem="relaxed")
            below += tl.sum((real & (bits < low)).to(tl.int32), 0)
            beyond = real & (bits >= low) & (cell >= CELLS)
            following = tl.minimum(following, tl.min(tl.where(beyond, bits, LAST), 0))
            largest = tl.maximum(largest, tl.max(tl.where(real, bits, 0), 0))
        tl.atomic_add(search.below + g, tl.sum(below).to(tl.int64), sem="relaxed")
        tl.atomic_min(search.following + g, tl.min(following), sem="relaxed")
        tl.atomic_max(search.largest + g, tl.max(largest), sem="relaxed")


@triton.jit
def select(search, entry_count):
    """Narrow each layer's interval to the cell that holds its rank, or to the side that does.

    At one bit pattern a cell the search ends: `value` and `next_value` are the magnitudes of the
    rank and of the one after it. Else the counters are cleared for the next count.
    """
    g = tl.program_id(0)
    if tl.load(search.done + g) == 0:
        cell = tl.arange(0, CELLS)
        held = tl.load(search.cells + g * CELLS + cell)
        below = tl.load(search.below + g)
        rank = tl.load(search.rank + g)
        low, shift = tl.load(search.low + g).to(tl.int64), tl.load(search.shift + g)
        upto = below + tl.cumsum(held.to(tl.int64), 0)
        hit = tl.sum((upto <= rank).to(tl.int32), 0)  # the rank's cell; CELLS if it lies beyond
        before, beyond = rank < below, hit == CELLS
        if (shift == 0) & (before == 0) & (beyond == 0):
            later = tl.where((cell > hit) & (held > 0), cell, CELLS)
            step = tl.min(later, 0)
            after = tl.where(step < CELLS, low + step, tl.load(search.following + g).to(tl.int64))
            ties_end = tl.sum(tl.where(cell == hit, upto, 0), 0)
            same = ties_end > tl.minimum(rank + 1, entry_count - 1)
            tl.store(search.value + g, (low + hit).to(tl.int32))
            tl.store(search.next_value + g, tl.where(same, low + hit, after).to(tl.int32))
            tl.store(search.done + g, 1)
        else:
            inner = low + (hit.to(tl.int64) << shift)  # with hit == CELLS the end of the interval
            missed = before | beyond
            tl.store(search.low + g, tl.where(before, 0, inner).to(tl.int32))
            narrower = tl.maximum(shift - CELL_BITS, 0)
            tl.store(search.shift + g, tl.where(missed, 31 - CELL_BITS, narrower))
            reset(search, g)


@triton.jit
def write(
    p, mixers, cut, scale, base, out, size,
    H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr, RULE: tl.constexpr,
    BASE: tl.constexpr, OUT: tl.constexpr, ALIGNED: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out = W0 + scale * sparse update, rounded once; `base` are the W0, or None."""
    g = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(size.I, BI)
    i = (tl.program_id(0) % across) * BI + tl.arange(0, BI)
    o = (tl.program_id(0) // across) * BO + tl.arange(0, BO)
    real = (o < size.O)[:, None] & (i < size.I)[None, :]
    w = mix(kernel(p, g, o, i, size, H, q, Q), mixers, g, i, size)
    result = rule_value(w, cut, g, RULE) * tl.load(scale + g)
    if base is not None:
        W0 = tile_of(base, g, o, i, BASE, ALIGNED)
        result += tl.load(W0, mask=real, other=0.0).to(tl.float32)
    tl.store(tile_of(out, g, o, i, OUT, ALIGNED), result.to(OUT), mask=real)
