"""Bi-LoRA: start, few-bit values, dropout on the code, final values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snell_diffusion.core.quantize import decode, encode, quantize
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.binary_lora import (
    BinaryLoraConfig,
    BinaryLoraConvLayer,
    BinaryLoraLayer,
)

I, O = 24, 40


def layer_on(base: nn.Module | None = None, **changes) -> BinaryLoraLayer:
    kind = BinaryLoraConvLayer if isinstance(base, nn.Conv2d) else BinaryLoraLayer
    base = nn.Linear(I, O) if base is None else base
    config = BinaryLoraConfig(**{"r": 4, "seed": 0, **changes})
    return kind(base.requires_grad_(False), "default", config, key="layer").eval()


def factors(layer: BinaryLoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.binary_lora_down["default"], layer.binary_lora_up["default"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_start(bits):
    layer = layer_on(bits=bits, r=16)
    down, up = factors(layer)
    assert down.abs().max() <= 1 / I**0.5
    delta = layer.get_delta_weight("default").detach()
    if bits == 32:
        assert not up.any()
        assert not delta.any()
    else:
        assert 0 < up.abs().max() <= 2e-3
        assert 5e-4 < up.std() < 1.2e-3
        assert 0 < delta.abs().max() < 16 * 2 * 3e-3 / I**0.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_update_is_the_product_of_quantized_factors(bits):
    layer = layer_on(bits=bits, scale=3.0)
    down, up = factors(layer)
    expected = 3.0 * quantize(up, bits) @ quantize(down, bits)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    assert len(quantize(down, bits).unique()) <= 2**bits


@pytest.mark.parametrize("bits", [1, 4])
def test_final_values_are_not_quantized_again(bits):
    layer = layer_on(bits=bits)
    final = layer_on(bits=bits, quantized=True)
    with torch.no_grad():
        for latent, value in zip(factors(layer), factors(final), strict=True):
            value.copy_(decode(*encode(latent, bits), bits, latent.shape))
    delta = layer.get_delta_weight("default")
    assert torch.equal(final.get_delta_weight("default"), delta)
    again = layer_on(bits=bits)
    again.load_state_dict(final.state_dict())
    assert not torch.allclose(again.get_delta_weight("default"), delta)


@pytest.mark.parametrize("bits", [1, 32])
def test_the_bound_holds(bits):
    layer = layer_on(bits=bits, scale=-2.0)
    with torch.no_grad():
        for W in factors(layer):
            W += torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    tensors = {name: c["default"] for name, c in layer.containers()}
    bound = BinaryLoraLayer.norm_bound(layer.configs["default"], tensors)
    norm = float(layer.get_delta_weight("default").detach().norm())
    assert 0 < norm <= bound * (1 + 1e-6) < 20 * norm


def test_dropout_drops_numbers_of_the_code():
    layer = layer_on(dropout=0.5, scale=2.0, r=64).train()
    x = torch.randn(3, 5, I)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    down, up = (quantize(W, 1) for W in factors(layer))
    code = F.dropout(x @ down.T, 0.5)
    torch.testing.assert_close(y, layer.base_layer(x) + 2.0 * code @ up.T)
    y.sum().backward()
    assert all(W.grad.abs().max() > 0 for W in factors(layer))
    undropped = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer.eval()(x), undropped)


def test_dropout_in_convolutions():
    layer = layer_on(nn.Conv2d(6, 8, 3, stride=2, padding=1), dropout=1e-9).train()
    with torch.no_grad():
        for W in factors(layer):
            W += torch.randn(W.shape)
    x = torch.randn(2, 6, 7, 7)
    dropped = layer(x).detach()
    torch.testing.assert_close(dropped, layer.eval()(x).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(SnellaConfigError, match=r"a convolution of 2 groups .* set dropout to 0"):
        layer_on(nn.Conv2d(6, 8, 3, groups=2), dropout=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_next_to_a_16_bit_base(dtype):
    layer = layer_on(nn.Linear(I, O).to(dtype), dropout=0.3).train()
    y = layer(torch.randn(3, I).to(dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(W.grad.dtype == torch.float32 for W in factors(layer))


def test_settings():
    with pytest.raises(SnellaConfigError, match="bits must be one of 1, 2, 4, 8, 32, got 3"):
        BinaryLoraConfig(bits=3)
    with pytest.raises(SnellaConfigError, match="bits must be one of 1, 2, 4, 8, 32, got True"):
        BinaryLoraConfig(bits=True)
    with pytest.raises(SnellaConfigError, match="quantized must be true or false, got 1"):
        BinaryLoraConfig(quantized=1)
