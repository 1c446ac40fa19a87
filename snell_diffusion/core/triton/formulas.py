"""One tile of an update, in registers: the device functions that every pass shares.

    tile[o,i]   rows are outputs, columns inputs, as in the weight of a Linear [O, I]

Each formula stands here once, so that the passes agree bit for bit: the threshold found by one is
compared with the very values another computes. `..kernels` and `..sparsify` say the mathematics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..kernels import PRODUCT_MIN_COLUMNS as _MIN_COLUMNS

EPS = tl.constexpr(2.0**-23)  # of float32
TINY = tl.constexpr(2.0**-126)  # smallest normal float32
PRODUCT_MIN_COLUMNS = tl.constexpr(_MIN_COLUMNS)
PRECISION = tl.constexpr("ieee")  # TF32 would lose the differences between distances


class Points(NamedTuple):
    """Pointers to G layers' points, moved to the mean of B; Q is q rounded up, filled with zeros.

    a [G, H, I, Q], b [G, H, O, Q], their squared norms [G, H, I] and [G, H, O], signs [G, H].
    """

    a: Any
    b: Any
    a_norm: Any
    b_norm: Any
    signs: Any


class Mixers(NamedTuple):
    """Pointers to alpha, gamma (positive) and beta, [G] each, and lse [G, I].

    lse is the logarithm of sum_o exp(K / gamma). The distance kernel has None in place of this.
    """

    alpha: Any
    gamma: Any
    beta: Any
    lse: Any


class Cut(NamedTuple):
    """Pointers to the thresholds [G] and to 1.0 for a matrix that is zero everywhere, else 0.0."""

    threshold: Any
    is_zero: Any


class Matrices(NamedTuple):
    """Where each layer's matrix begins, addresses [G], and from one row to the next, in entries."""

    addresses: Any
    pitch: Any


class Size(NamedTuple):
    """Inputs, outputs."""

    I: Any
    O: Any


@triton.jit
def rows(points, head, n, N, Q: tl.constexpr):
    """Points n of one head, [len(n), Q]; zero from N on."""
    at = (head * N + n)[:, None] * Q + tl.arange(0, Q)[None, :]
    return tl.load(points + at, mask=(n < N)[:, None], other=0.0)


@triton.jit
def column(points, head, n, N, k, Q: tl.constexpr):
    """Coordinate k of points n, [len(n)]; zero from N on."""
    return tl.load(points + (head * N + n) * Q + k, mask=n < N, other=0.0)


@triton.jit
def entries(values, row, n, N):
    """values[row, n] of an array with rows of N; zero from N on."""
    return tl.load(values + row * N + n, mask=n < N, other=0.0)


@triton.jit
def tile_of(matrices, g, o, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers into layer g's matrix; from a multiple of 16 bytes on it is read in wide pieces."""
    start = tl.load(matrices.addresses + g).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + o.to(tl.int64)[:, None] * matrices.pitch + i[None, :]


@triton.jit
def distance(p, head, o, i, size, q: tl.constexpr, Q: tl.constexpr):
    """|b_o - a_i| of one head, by the rules of `..kernels`: what is below the noise is zero.

    A factor in place of a choice, so that NaN stays NaN.
    """
    if q < PRODUCT_MIN_COLUMNS:
        gap = column(p.b, head, o, size.O, 0, Q)[:, None] - column(p.a, head, i, size.I, 0, Q)
        squared = gap * gap
        for k in tl.static_range(1, q):
            gap = column(p.b, head, o, size.O, k, Q)[:, None] - column(p.a, head, i, size.I, k, Q)
            squared += gap * gap
    else:
        norms = entries(p.b_norm, head, o, size.O)[:, None] + entries(p.a_norm, head, i, size.I)
        a, b = rows(p.a, head, i, size.I, Q), rows(p.b, head, o, size.O, Q)
        squared = norms - 2.0 * tl.dot(b, tl.trans(a), input_precision=PRECISION)
        squared *= (squared > norms * (EPS * (q + 2))).to(tl.float32)
    return tl.sqrt(squared)


@triton.jit
def kernel(p, g, o, i, size, H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr):
    """K = sum_h signs[h] |a_i - b_o| of layer g."""
    K = tl.load(p.signs + g * H) * distance(p, g * H, o, i, size, q, Q)
    for h in tl.static_range(1, H):
        K += tl.load(p.signs + g * H + h) * distance(p, g * H + h, o, i, size, q, Q)
    return K


@triton.jit
def log_probability(K, mixers, g, i, size):
    """log softmax_o(K / gamma); not above 0, also by rounding and outside of the matrix."""
    z = K / tl.load(mixers.gamma + g) - entries(mixers.lse, g, i, size.I)[None, :]
    return tl.minimum(z, 0.0)


@triton.jit
def mix(K, mixers, g, i, size):
    """w: K itself, or K + alpha softmax_o(K / gamma) + beta where there are mixers."""
    w = K
    if mixers is not None:
        share = tl.exp(log_probability(K, mixers, g, i, size))
        w = K + tl.load(mixers.alpha + g) * share + tl.load(mixers.beta + g)
    return w


@triton.jit
def rule_value(w, cut, g, RULE: tl.constexpr):
    """The sparse update, see the table of `..sparsify.sparsify`."""
    value = w
    if RULE != "none":
        t = tl.load(cut.threshold + g)
        a = tl.abs(w)
        kept = (a > t).to(tl.float32)
        if RULE == "squared" or RULE == "squared_true":
            value = w * (kept * a)
        elif RULE == "printed" or RULE == "printed_true":
            value = w * tl.maximum(a - t, 0.0)
        elif RULE == "mask":
            value = w * (kept + tl.load(cut.is_zero + g))
        elif RULE == "soft":
            sign = (w > 0).to(tl.float32) - (w < 0).to(tl.float32)
            value = (w - sign * t) * (kept + tl.load(cut.is_zero + g))
        else:
            tl.static_assert(False, "unknown rule")
    return value


@triton.jit
def rule_gradient(w, cut, g, RULE: tl.constexpr):
    """What the gradient of the sparse update is multiplied with to be that of w."""
    a = tl.abs(w)
    factor = a * 0.0 + 1.0
    if RULE != "none":
        t = tl.load(cut.threshold + g)
        kept = (a > t).to(tl.float32)
        if RULE == "squared":
            factor = a * kept
        elif RULE == "squared_true":
            factor = 2.0 * a * kept
        elif RULE == "printed":
            factor = tl.maximum(a - t, 0.0)
        elif RULE == "printed_true":
            factor = (2.0 * a - t) * kept
        elif RULE == "mask" or RULE == "soft":
            factor = kept + tl.load(cut.is_zero + g)
        else:
            tl.static_assert(False, "unknown rule")
    return factor
