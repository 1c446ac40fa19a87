"""Levels, straight-through gradients and packing of few-bit matrices."""

import math

import pytest
import torch

from snell_diffusion.core.quantize import BITS, decode, encode, levels, packed_bytes, quantize

SHAPES = [(1, 2), (3, 5), (7, 1), (16, 24), (5, 13)]


def latent(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.03 * torch.randn(*shape, generator=generator, dtype=dtype)) + 0.01


def plain(W: torch.Tensor, bits: int) -> torch.Tensor:
    """Wq as it is written down: a sum of signs."""
    v = levels(bits).float().to(W.dtype)
    mu, sigma = W.mean(), W.std()
    z = (W - mu) / (sigma + 1e-5)
    steps = torch.sign(z.unsqueeze(-1) - (v[1:] + v[:-1]) / 2) * (v[1:] - v[:-1]) / 2
    return steps.sum(-1) * sigma + mu


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_the_medians_of_their_cells(bits):
    v = levels(bits)
    assert v.dtype == torch.float64
    assert v.shape == (2**bits,)
    assert (v.diff() > 0).all()
    torch.testing.assert_close(v, -v.flip(0), rtol=0, atol=1e-9)
    cdf = torch.special.ndtr((v[1:] + v[:-1]) / 2)
    middles = (torch.cat([cdf.new_zeros(1), cdf]) + torch.cat([cdf, cdf.new_ones(1)])) / 2
    settled = 1e-9 if bits < 8 else 1e-3  # 500 rounds, as the public code
    torch.testing.assert_close(torch.special.ndtr(v), middles, rtol=0, atol=settled)


def test_one_bit_is_the_median_of_half_a_normal():
    torch.testing.assert_close(float(levels(1)[1]), 0.6744897501960817, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_is_the_sum_of_signs(bits):
    W = latent(16, 24, dtype=torch.float64)
    torch.testing.assert_close(quantize(W, bits), plain(W, bits), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_written_down(bits):
    W = latent(9, 11, dtype=torch.float64).requires_grad_()
    g = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    quantize(W, bits).backward(g)
    with torch.no_grad():
        N, mu, sigma = W.numel(), W.mean(), W.std()
        zq = (quantize(W, bits) - mu) / sigma
        through = sigma / (sigma + 1e-5)
        mean_term = g.sum() - g.sum() * through
        sigma_term = (g * zq).sum() - (g * sigma * (W - mu)).sum() / (sigma + 1e-5) ** 2
        expected = g * through + mean_term / N + sigma_term * (W - mu) / ((N - 1) * sigma)
    torch.testing.assert_close(W.grad, expected, rtol=1e-9, atol=1e-13)


def test_a_value_on_a_boundary_becomes_the_boundary():
    W = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
    assert quantize(W, 1)[0, 1] == 0.0
    codes, _ = encode(W, 1)
    assert codes.tolist() == [0b100]  # stored as the lower level


def test_a_constant_matrix_stays_constant_with_finite_gradients():
    W = torch.full((3, 4), 0.5, requires_grad=True)
    Wq = quantize(W, 1)
    assert (Wq == 0.5).all()
    Wq.sum().backward()
    assert torch.isfinite(W.grad).all()
    codes, stats = encode(W, 1)
    assert (decode(codes, stats, 1, (3, 4)) == 0.5).all()


def test_computed_in_float32_whatever_the_input():
    W = latent(8, 8).bfloat16()
    assert quantize(W, 2).dtype == torch.float32
    assert torch.equal(quantize(W, 2), quantize(W.float(), 2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_what_was_used(bits, shape):
    W = latent(*shape, seed=sum(shape))
    codes, stats = encode(W, bits)
    assert codes.dtype == torch.uint8
    assert stats.dtype == torch.float32
    assert len(codes) == math.ceil(bits * W.numel() / 8)
    assert len(codes) + 4 * len(stats) == packed_bytes(W.numel(), bits)
    assert torch.equal(decode(codes, stats, bits, shape), quantize(W, bits))


def test_the_first_weight_is_in_the_lowest_bits():
    W = torch.tensor([[3.0, -3.0, -0.1, 0.1], [3.0, -3.0, -0.2, 0.2]])
    codes, _ = encode(W, 2)
    assert codes.tolist() == [0b10_01_00_11, 0b10_01_00_11]
    assert encode(W, 1)[0].tolist() == [0b1001_1001]


def test_a_tail_that_fills_no_byte_is_kept():
    W = torch.tensor([[-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0]])
    codes, stats = encode(W, 1)
    assert codes.tolist() == [0, 1]
    decoded = decode(codes, stats, 1, (1, 9))
    assert decoded[0, -1] > decoded[0, 0]


@pytest.mark.parametrize(
    ("layers", "bits", "bytes_"), [(24, 1, 73_920 * 2), (12, 1, 73_920)], ids=["lora", "adapter"]
)
def test_published_sizes(layers, bits, bytes_):
    assert layers * 2 * packed_bytes(768 * 32, bits) == bytes_


def test_unknown_bits_and_single_weights():
    for call in (
        levels,
        lambda bits: packed_bytes(8, bits),
        lambda bits: quantize(latent(2), bits),
    ):
        with pytest.raises(ValueError, match="bits must be one of 1, 2, 4, 8, got 3"):
            call(3)
    with pytest.raises(ValueError, match=r"two or more weights .* got shape \(1, 1\)"):
        quantize(torch.ones(1, 1), 1)
    with pytest.raises(ValueError, match=r"only finite weights can be stored in 1 bits"):
        encode(torch.tensor([1.0, torch.inf]), 1)


def test_stored_parts_that_do_not_belong_together():
    codes, stats = encode(latent(3, 5), 2)
    with pytest.raises(ValueError, match=r"2-bit codes of a \(3, 6\) matrix are 5 bytes .* \[4\]"):
        decode(codes, stats, 2, (3, 6))
    with pytest.raises(ValueError, match=r"uint8 \[4\].*torch.int64"):
        decode(codes.long(), stats, 2, (3, 5))
    for broken in (stats[:1], torch.tensor([0.0, -1.0]), torch.tensor([torch.nan, 1.0])):
        with pytest.raises(ValueError, match="must be 2 finite numbers, the second 0 or more"):
            decode(codes, broken, 2, (3, 5))
