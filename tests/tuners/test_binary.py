"""Bi-LoRA and Bi-AdaptFormer: start, few-bit values, dropout on the code, final values, places."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from snell_diffusion.core.quantize import decode, encode, quantize
from snell_diffusion.errors import SnellaConfigError, SnellaValueError
from snell_diffusion.tuners import delta_layers, delta_parameters
from snell_diffusion.tuners.binary_adapter import BinaryAdapterConfig, BinaryAdapterLayer
from snell_diffusion.tuners.binary_lora import (
    BinaryLoraConfig,
    BinaryLoraConvLayer,
    BinaryLoraLayer,
)
from tests.tuners.conftest import family_named

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


# Bi-AdaptFormer

BLOCKS = pytest.mark.parametrize("name", ["vit", "unet_sd15", "unet_sdxl", "sd3", "flux"])


def adapted(name: str, **changes) -> nn.Module:
    config = BinaryAdapterConfig(**{"r": 4, "seed": 0, "scale": 3.0, **changes})
    return inject_adapter_in_model(config, family_named(name).model()).eval()


def stir_model(model: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in delta_parameters(model, "default").values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def test_the_block_is_that_of_the_paper():
    """x + mlp(ln x) + s up(relu(down x)), by hand on one block of a vision transformer."""
    model = adapted("vit")
    stir_model(model)
    layers = dict(delta_layers(model))
    path, layer = next(iter(layers.items()))
    block = model.get_submodule(path.partition(".mlp")[0])
    x = torch.randn(2, 5, 32)
    down, up = (
        quantize(W["default"], 1) for W in (layer.binary_adapter_down, layer.binary_adapter_up)
    )
    with torch.no_grad():
        block.mlp.fc2.enable_adapters(False)
        base = block(x)
        normed = []
        handle = block.layernorm_after.register_forward_pre_hook(lambda m, a: normed.append(a[0]))
        base = base[0] if isinstance(base, tuple) else base
        block.mlp.fc2.enable_adapters(True)
        got = block(x)
        got = got[0] if isinstance(got, tuple) else got
        handle.remove()
    expected = base + 3.0 * torch.relu(normed[-1] @ down.T) @ up.T
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@BLOCKS
def test_one_adapter_by_mlp_of_known_blocks(name):
    family, model = family_named(name), adapted(name)
    paths = [path for path, _ in delta_layers(model)]
    assert paths
    assert all(path.endswith(("fc2", "net.2")) for path in paths)
    with torch.no_grad():
        base, small = family.run(family.base), family.run(model)
        change = (small - base).abs().max()
        assert 0 < change < 0.1 * base.abs().max()
        stir_model(model)
        assert (family.run(model) - base).abs().max() > change
        for _, layer in delta_layers(model):
            layer.enable_adapters(False)
        assert torch.equal(family.run(model), base)
    assert all(layer.seen.x is None for _, layer in delta_layers(model))


@BLOCKS
def test_gradients_reach_both_matrices_and_what_comes_before(name):
    family, model = family_named(name), adapted(name).train()
    stir_model(model)
    family.run(model).square().sum().backward()
    for path, parameter in delta_parameters(model, "default").items():
        assert parameter.grad.abs().max() > 0, path


def test_in_checkpointed_blocks():
    family, model = family_named("vit"), adapted("vit").train()
    stir_model(model)
    family.run(model).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in delta_parameters(model, "default").items()}
    model.zero_grad()
    for block in model.layers:
        forward = block.forward
        block.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
    family.run(model).square().sum().backward()
    for name, parameter in delta_parameters(model, "default").items():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_copies_read_their_own_norms():
    family, model = family_named("vit"), adapted("vit")
    stir_model(model)
    copy = deepcopy(model)
    expected = family.run(model)
    assert torch.equal(family.run(copy), expected)
    assert {id(layer.seen) for _, layer in delta_layers(model)}.isdisjoint(
        id(layer.seen) for _, layer in delta_layers(copy)
    )


def test_nothing_is_left_on_the_norms():
    base = nn.ModuleDict({"norm2": nn.LayerNorm(8), "ff": nn.ModuleDict({"fc2": nn.Linear(9, 8)})})
    config = BinaryAdapterConfig(r=4)
    model = get_peft_model(base, config)
    assert len(base["norm2"]._forward_pre_hooks) == 1
    model.add_adapter("second", config)
    assert len(base["norm2"]._forward_pre_hooks) == 1
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert len(base["norm2"]._forward_pre_hooks) == 1
    model.unload()
    assert len(base["norm2"]._forward_pre_hooks) == 0


def test_blocks_that_are_not_known():
    with pytest.raises(
        SnellaConfigError, match=r"0, 2 is no MLP's output by its name.*use Bi-LoRA"
    ):
        inject_adapter_in_model(
            BinaryAdapterConfig(target_modules=["0", "2"]), family_named("mlp").model()
        )
    base = nn.ModuleDict({"block": nn.ModuleDict({"fc2": nn.Linear(9, 8)})})
    with pytest.raises(SnellaConfigError, match=r"block.fc2 .* has no norm of a known name"):
        inject_adapter_in_model(BinaryAdapterConfig(), base)
    layer = BinaryAdapterLayer(nn.Linear(9, 8), "default", BinaryAdapterConfig(r=4), "fc2")
    with pytest.raises(SnellaConfigError, match="has no norm of a known name"):
        layer(torch.randn(2, 9))
    norm, other = nn.LayerNorm(4), nn.LayerNorm(8)
    layer.watch(other)
    layer.watch(norm)
    assert not other._forward_pre_hooks
    with pytest.raises(SnellaValueError, match=r"which did not run before it.*use Bi-LoRA"):
        layer(torch.randn(2, 9))
    norm(torch.randn(2, 4))
    with pytest.raises(SnellaValueError, match=r"\[2, 8\].*\[2, 4\]: this block is put together"):
        layer(torch.randn(2, 9))


def test_adapters_do_not_merge():
    layer = next(iter(delta_layers(adapted("vit"))))[1]
    with pytest.raises(ValueError, match="Bi-AdaptFormer cannot be merged: its adapters have a Re"):
        layer.merge()
