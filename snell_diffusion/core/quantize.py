"""Matrices of a few bits: every weight becomes one of 2^bits levels of a normal distribution.

    z = (W - mu) / (sigma + 1e-5),   Wq = v[nearest] sigma + mu      Bi-adapters (arXiv:2307.16867)

mu and sigma are mean and standard deviation (N - 1) of the whole matrix, N its number of weights.
The levels v_k are the medians of their cells under a standard normal, not their means: one bit
gives ±0.67449, as the public code does. Stored are ceil(bits N / 8) bytes of level indices and mu
and sigma as float32.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .precision import full

BITS = (1, 2, 4, 8)
ROUNDS = 500
EPS = 1e-5
STATS_BYTES = 8


def levels(bits: int) -> Tensor:
    """The levels v_k of a standard normal, ascending, [2^bits] float64.

    From 0, `ROUNDS` times: boundaries halfway between neighbours, then every level the median of
    its cell. That many rounds have settled for 1, 2 and 4 bits; the 256 levels of 8 bits are where
    the public code's stop.

    Raises:
        ValueError: `bits` is not 1, 2, 4 or 8.
    """
    _check_bits(bits)
    return torch.tensor(_LEVELS[bits], dtype=torch.float64)


def quantize(W: Tensor, bits: int) -> Tensor:
    """Wq of a latent matrix: what a forward pass multiplies by.

    The step to the nearest level counts as the identity for gradients (straight-through); mu and
    sigma are differentiated. A value halfway between two levels, z exactly on a boundary, becomes
    the boundary.

    Args:
        W: Latent weights, any shape, two or more of them.
        bits: 1, 2, 4 or 8.

    Returns:
        The same shape; float32, or float64 for float64.

    Raises:
        ValueError: `bits` is unknown, or W has fewer than two weights.
    """
    W = full(W)
    mu, sigma = _moments(W, bits)
    z = (W - mu) / (sigma + EPS)
    v, boundaries = _table(bits, W)
    with torch.no_grad():
        index = torch.bucketize(z, boundaries)
        below = boundaries[index.clamp(max=len(boundaries) - 1)]
        zq = torch.where(z == below, below, v[index])
    return (zq + (z - z.detach())) * sigma + mu


def encode(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A latent matrix as it is stored.

    A value halfway between two levels is stored as the lower one.

    Args:
        W: Latent weights, any shape, two or more of them.
        bits: 1, 2, 4 or 8.

    Returns:
        Level indices, uint8 [ceil(bits N / 8)], row-major with the first weight in the lowest bits
        and zeros after the last; mu and sigma, float32 [2].

    Raises:
        ValueError: `bits` is unknown, W has fewer than two weights, or they are not finite.
    """
    W = full(W.detach())
    mu, sigma = _moments(W, bits)
    stats = torch.stack([mu, sigma]).float()
    if not bool(torch.isfinite(stats).all()):
        raise ValueError(
            f"only finite weights can be stored in {bits} bits, mean and standard deviation of "
            f"this {tuple(W.shape)} matrix are {stats.tolist()}: load an earlier adapter"
        )
    _, boundaries = _table(bits, W)
    index = torch.bucketize((W - mu) / (sigma + EPS), boundaries).flatten()
    per_byte = 8 // bits
    padded = torch.zeros(-(-index.numel() // per_byte) * per_byte, dtype=torch.int64)
    padded[: index.numel()] = index.cpu()
    codes = (padded.view(-1, per_byte) << _shifts(bits)).sum(1).to(torch.uint8)
    return codes, stats.cpu()


def decode(codes: Tensor, stats: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The weights that were stored, v[index] sigma + mu, as float32 of a shape.

    Args:
        codes: What `encode` gave, uint8 [ceil(bits N / 8)] for the N weights of the shape.
        stats: mu and sigma, [2], finite, sigma 0 or more.
        bits: 1, 2, 4 or 8.
        shape: Shape of the matrix.

    Raises:
        ValueError: These do not belong together; says what was expected and what came.
    """
    expected = packed_bytes(prod(shape), bits) - STATS_BYTES
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (expected,):
        raise ValueError(
            f"{bits}-bit codes of a {tuple(shape)} matrix are {expected} bytes (uint8 [{expected}])"
            f", got {codes.dtype} {list(codes.shape)}"
        )
    if tuple(stats.shape) != (2,) or not bool(torch.isfinite(stats).all()) or float(stats[1]) < 0:
        raise ValueError(
            "mean and standard deviation of packed weights must be 2 finite numbers, the second "
            f"0 or more; got {stats.tolist() if stats.numel() < 9 else list(stats.shape)}"
        )
    index = (codes.long().unsqueeze(1) >> _shifts(bits).to(codes.device)) & (2**bits - 1)
    v, _ = _table(bits, stats.float())
    mu, sigma = stats.float()
    return (v[index.flatten()[: prod(shape)]] * sigma + mu).reshape(tuple(shape))


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes a matrix of `numel` weights is stored in: its codes, and 8 for mu and sigma.

    Raises:
        ValueError: `bits` is not 1, 2, 4 or 8.
    """
    _check_bits(bits)
    return -(-numel * bits // 8) + STATS_BYTES


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")


def _moments(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _check_bits(bits)
    if W.numel() < 2:
        raise ValueError(
            f"a matrix of two or more weights can be quantized, since its standard deviation is "
            f"needed; got shape {tuple(W.shape)}"
        )
    return W.mean(), W.std()


def _levels(bits: int) -> tuple[float, ...]:
    v = torch.zeros(2**bits, dtype=torch.float64, device="cpu")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    for _ in range(ROUNDS):
        cdf = torch.special.ndtr((v[1:] + v[:-1]) / 2)
        cdf = torch.cat([ends[:1], cdf, ends[1:]])
        v = torch.special.ndtri((cdf[1:] + cdf[:-1]) / 2)
    return tuple(v.tolist())


_LEVELS = {bits: _levels(bits) for bits in BITS}  # 20 ms, once: compiled code cannot compute them


def _table(bits: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and the boundaries between them; rounded to float32, which is what files mean."""
    v = torch.tensor(_LEVELS[bits], dtype=torch.float32, device=like.device).to(like.dtype)
    return v, (v[1:] + v[:-1]) / 2


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits)
