"""Backward passes over G layers of one shape, from the gradient of the weights to A, B and mixers.

    g    = scale dW rule'(w)                                gradient of w
    P    = softmax_o(K / gamma),  r_i = sum_o g P           the softmax's correction, one sum a row
    dK   = g + alpha / gamma P (g - r)
    R_h  = signs[h] dK / |a - b|                            0 where the distance is 0
    dA_i = sum_o R (a_i - b_o),  dB_o = sum_i R (b_o - a_i)

Axes of the programs as in `passes`; what is shared out along axis 2 comes in parts, to be added up.
A part belongs to one program, which adds in a fixed order: the results repeat bit for bit.
"""

import triton
import triton.language as tl

from .formulas import (
    PRECISION,
    PRODUCT_MIN_COLUMNS,
    TINY,
    column,
    distance,
    entries,
    kernel,
    log_probability,
    mix,
    rows,
    rule_gradient,
    tile_of,
)


@triton.jit
def update_gradient(
    K, mixers, cut, scale, dW, g, o, i, size,
    RULE: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Gradient of w: scale dW rule'(w); zero outside of the matrix."""
    real = (o < size.O)[:, None] & (i < size.I)[None, :]
    given = tl.load(tile_of(dW, g, o, i, GRAD, ALIGNED), mask=real, other=0.0)
    factor = rule_gradient(mix(K, mixers, g, i, size), cut, g, RULE)
    return given.to(tl.float32) * tl.load(scale + g) * factor


@triton.jit
def kernel_gradient(grad_w, K, mixers, row_gradient, g, o, i, size):
    """Gradient of K: that of w, and through the softmax; zero outside of the matrix."""
    grad = grad_w
    if mixers is not None:
        share = tl.exp(log_probability(K, mixers, g, i, size))
        r = entries(row_gradient, g, i, size.I)[None, :]
        steepness = tl.load(mixers.alpha + g) / tl.load(mixers.gamma + g)
        real = (o < size.O)[:, None] & (i < size.I)[None, :]
        grad += tl.where(real, steepness * share * (grad_w - r), 0.0)
    return grad


@triton.jit
def row_sums(
    p, mixers, cut, scale, dW, sums, size, span,
    H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr, RULE: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Sums over o of each row, [parts, 4, G, I]: g P, g, g P log(O P) and P log(O P).

    The first is r; alpha, beta and gamma have their gradients from all four. The factor O changes
    nothing in exact numbers, and keeps the last two small where P is almost the same everywhere.
    """
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    r = tl.zeros([BI], tl.float32)
    plain = tl.zeros([BI], tl.float32)
    weighted = tl.zeros([BI], tl.float32)
    entropy = tl.zeros([BI], tl.float32)
    first = tl.program_id(2) * span
    for start in range(first, tl.minimum(first + span, size.O), BO):
        o = start + tl.arange(0, BO)
        K = kernel(p, g, o, i, size, H, q, Q)
        grad = update_gradient(K, mixers, cut, scale, dW, g, o, i, size, RULE, GRAD, ALIGNED)
        logarithm = log_probability(K, mixers, g, i, size)
        share = tl.where((o < size.O)[:, None], tl.exp(logarithm), 0.0)
        logarithm += tl.log(size.O * 1.0)
        r += tl.sum(grad * share, 0)
        plain += tl.sum(grad, 0)
        weighted += tl.sum(grad * share * logarithm, 0)
        entropy += tl.sum(share * logarithm, 0)
    step = tl.num_programs(1).to(tl.int64) * size.I
    at = sums + 4 * tl.program_id(2) * step + g * size.I + i
    tl.store(at, r, mask=i < size.I)
    tl.store(at + step, plain, mask=i < size.I)
    tl.store(at + 2 * step, weighted, mask=i < size.I)
    tl.store(at + 3 * step, entropy, mask=i < size.I)


@triton.jit
def pull(R, here, there, head, n, N, m, M, q: tl.constexpr, Q: tl.constexpr):
    """sum_m R[n,m] (here_n - there_m), [len(n), Q]."""
    if q < PRODUCT_MIN_COLUMNS:  # near-coincident points are common: no difference of sums
        coordinates = tl.arange(0, Q)[None, :]
        total = tl.zeros([R.shape[0], Q], tl.float32)
        for k in tl.static_range(q):
            gap = column(here, head, n, N, k, Q)[:, None] - column(there, head, m, M, k, Q)[None, :]
            total += tl.where(coordinates == k, tl.sum(R * gap, 1)[:, None], 0.0)
    else:
        pulled = tl.dot(R, rows(there, head, m, M, Q), input_precision=PRECISION)
        total = rows(here, head, n, N, Q) * tl.sum(R, 1)[:, None] - pulled
    return total


@triton.jit
def quotient(grad, p, head, o, i, size, q: tl.constexpr, Q: tl.constexpr):
    """R = sign dK / distance of one head, 0 where the distance is 0; NaN stays."""
    d = distance(p, head, o, i, size, q, Q)
    return grad * tl.load(p.signs + head) * (d / (d * d + TINY))


@triton.jit
def input_points(
    p, mixers, cut, scale, dW, row_gradient, dA, size, span,
    H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr, RULE: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dA [parts, G, H, I, q]: a program owns BI inputs and goes over outputs."""
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    total = ()
    for _ in tl.static_range(H):
        total += (tl.zeros([BI, Q], tl.float32),)
    first = tl.program_id(2) * span
    for start in range(first, tl.minimum(first + span, size.O), BO):
        o = start + tl.arange(0, BO)
        K = kernel(p, g, o, i, size, H, q, Q)
        grad = update_gradient(K, mixers, cut, scale, dW, g, o, i, size, RULE, GRAD, ALIGNED)
        grad = kernel_gradient(grad, K, mixers, row_gradient, g, o, i, size)
        more = ()
        for h in tl.static_range(H):
            R = tl.trans(quotient(grad, p, g * H + h, o, i, size, q, Q))
            more += (total[h] + pull(R, p.a, p.b, g * H + h, i, size.I, o, size.O, q, Q),)
        total = more
    k = tl.arange(0, Q)[None, :]
    layer = tl.program_id(2) * tl.num_programs(1) + g
    for h in tl.static_range(H):
        at = dA + ((layer * H + h) * size.I + i)[:, None] * q + k
        tl.store(at, total[h], mask=(i < size.I)[:, None] & (k < q))


@triton.jit
def output_points(
    p, mixers, cut, scale, dW, row_gradient, dB, size, span,
    H: tl.constexpr, q: tl.constexpr, Q: tl.constexpr, RULE: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dB [parts, G, H, O, q]: a program owns BO outputs and goes over inputs."""
    g = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    total = ()
    for _ in tl.static_range(H):
        total += (tl.zeros([BO, Q], tl.float32),)
    first = tl.program_id(2) * span
    for start in range(first, tl.minimum(first + span, size.I), BI):
        i = start + tl.arange(0, BI)
        K = kernel(p, g, o, i, size, H, q, Q)
        grad = update_gradient(K, mixers, cut, scale, dW, g, o, i, size, RULE, GRAD, ALIGNED)
        grad = kernel_gradient(grad, K, mixers, row_gradient, g, o, i, size)
        more = ()
        for h in tl.static_range(H):
            R = quotient(grad, p, g * H + h, o, i, size, q, Q)
            more += (total[h] + pull(R, p.b, p.a, g * H + h, o, size.O, i, size.I, q, Q),)
        total = more
    k = tl.arange(0, Q)[None, :]
    layer = tl.program_id(2) * tl.num_programs(1) + g
    for h in tl.static_range(H):
        at = dB + ((layer * H + h) * size.O + o)[:, None] * q + k
        tl.store(at, total[h], mask=(o < size.O)[:, None] & (k < q))
