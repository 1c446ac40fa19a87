"""Convolutions: the update of flattened kernels is exact, whatever the convolution's geometry."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from snell_diffusion import SnellaConfig
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.conv import ConvLayer
from snell_diffusion.tuners.snella import SnellaConvLayer

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": (0, 1)},
    "dilated": {"kernel_size": (3, 2), "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "no bias": {"kernel_size": 3, "bias": False},
}


# torch itself warns that an even kernel's "same" takes one more row on one side.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def conv_layer(geometry: str = "plain", seed: int = 1, **config: Any) -> SnellaConvLayer:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **GEOMETRIES[geometry])
    settings = SnellaConfig(**{"r": 4, "seed": seed, "init_sparsity": 0.3, **config})
    layer = SnellaConvLayer(conv, "default", settings, "conv")
    with torch.no_grad():
        layer.snella_A["default"].mul_(100)
    return layer


def pictures(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 9, 8)), generator=torch.Generator().manual_seed(5))


def merged_twin(layer: ConvLayer) -> nn.Conv2d:
    """The base convolution with the update written into its kernels by hand."""
    twin = copy.deepcopy(layer.get_base_layer())
    with torch.no_grad():
        twin.weight += layer.get_delta_weight("default").reshape(twin.weight.shape)
    return twin


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forward_is_the_convolution_with_merged_kernels(geometry: str) -> None:
    layer, x = conv_layer(geometry), pictures()
    expected = merged_twin(layer)(x).detach()
    assert float((expected - layer.get_base_layer()(x).detach()).abs().max()) > 1e-2
    torch.testing.assert_close(layer(x), expected)  # differentiated
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)  # from the kept update


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_are_those_of_plain_autograd(geometry: str) -> None:
    layer, x = conv_layer(geometry), pictures().requires_grad_()
    twin = copy.deepcopy(layer.get_base_layer()).requires_grad_(False)
    fn, params = layer._combined(("default",))
    kernels = twin.weight + fn(*params).reshape(twin.weight.shape)
    names = [n for n, p in layer.named_parameters() if p.requires_grad and "snella" in n]
    sources = [x, *(dict(layer.named_parameters())[n] for n in names)]
    plain = twin._conv_forward(x, kernels, twin.bias)
    weight = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weight).sum(), sources)
    found = torch.autograd.grad((layer(x) * weight).sum(), sources)
    for name, a, b in zip(["x", *names], wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()), msg=name)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_unmerge_restores_every_bit(memory: torch.memory_format) -> None:
    layer, x = conv_layer(), pictures()
    layer.base_layer.to(memory_format=memory)
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        unmerged = layer.eval()(x)
        layer.merge(safe_merge=True)
        torch.testing.assert_close(layer(x), unmerged)
        assert not torch.equal(layer.base_layer.weight, before)
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.base_layer.weight.is_contiguous(memory_format=memory)


def test_scale_threshold_and_two_adapters_add_up() -> None:
    layer, x = conv_layer(), pictures()
    layer.update_layer("second", SnellaConfig(r=2, heads=2, seed=9), "conv")
    layer.set_adapter(["default", "second"], inference_mode=True)
    layer.set_scale("second", 3.0)
    layer.set_sparsity("default", 0.9)
    kept = int((layer.get_delta_weight("default") != 0).sum())
    assert kept == layer.kept("default") == 8 * 36 - round(0.9 * 8 * 36)
    total = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    base = layer.get_base_layer()
    with torch.no_grad():
        expected = F.conv2d(x, base.weight + total.view_as(base.weight), base.bias, padding=1)
        torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_called_as_it_is(dtype: torch.dtype) -> None:
    """The update is a second convolution, so that rounding the sum loses none of it."""
    layer, x = conv_layer().to(dtype), pictures().to(dtype)
    layer.fold_16bit = False
    base, delta = layer.get_base_layer(), layer.get_delta_weight("default")
    kernels = delta.view(base.weight.shape).to(dtype)
    with torch.no_grad():
        expected = base(x) + F.conv2d(x, kernels, padding=1)
        torch.testing.assert_close(layer.eval()(x), expected)
    layer.train()(x).float().square().sum().backward()
    assert bool(layer.snella_A["default"].grad.isfinite().all())


def test_autocast_lowers_the_product_and_not_the_update() -> None:
    layer, x = conv_layer(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    gradient = layer.snella_B["default"].grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, layer.snella_B["default"].grad, rtol=0.1, atol=0.1)


def test_dropout_falls_on_the_updates_input_alone() -> None:
    layer, x = conv_layer(dropout=0.5), pictures()
    torch.manual_seed(3)
    y = layer.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    delta = layer.get_delta_weight("default").view_as(layer.base_layer.weight)
    expected = layer.base_layer(x) + F.conv2d(dropped, delta, padding=1)
    torch.testing.assert_close(y, expected)


def test_one_model_with_linear_and_convolution_merges_as_a_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    adapted = get_peft_model(copy.deepcopy(model), SnellaConfig(r=4, target_modules=["0", "2"]))
    kinds = [layer.kind for _, layer in delta_layers(adapted)]
    assert kinds == ["conv2d", "linear"]
    x = pictures(2, 3, 8, 8)
    with torch.no_grad():
        expected = adapted.eval()(x)
        torch.testing.assert_close(adapted.merge_and_unload()(x), expected)
        assert float((expected - model(x)).abs().max()) > 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_convolution_that_lora_has_wrapped_takes_an_update_too() -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "l"
    )
    x = pictures(1, 3, 6, 6)
    with torch.no_grad():
        lora = model.eval()(x)
        inject_adapter_in_model(SnellaConfig(r=4, target_modules=["0"], seed=1), model, "s")
        [(_, layer)] = delta_layers(model)
        delta = layer.get_delta_weight("s").view(4, 3, 3, 3)
        torch.testing.assert_close(model.eval()(x), lora + F.conv2d(x, delta))


def test_compiled_without_graph_breaks() -> None:
    layer, x = conv_layer("strided").eval(), pictures()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
