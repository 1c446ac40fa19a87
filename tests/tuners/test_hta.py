"""HTA's layer: start, placement, sizes and settings; the formula is tested in core."""

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.hta import HtaConfig, HtaConvLayer, HtaLayer

I, O = 24, 40


def layer_on(base: nn.Module | None = None, **changes) -> HtaLayer:
    kind = HtaConvLayer if isinstance(base, nn.Conv2d) else HtaLayer
    base = nn.Linear(I, O) if base is None else base
    config = HtaConfig(**{"seed": 0, **changes})
    return kind(base.requires_grad_(False), "default", config, key="layer").eval()


def stir(layer: HtaLayer, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.delta_params("default"):
            parameter += size * torch.randn(parameter.shape, generator=generator)


def sizes(layer: HtaLayer) -> dict[str, list[int]]:
    return {name: list(c["default"].shape) for name, c in layer.containers() if "default" in c}


def test_tensors_by_bottleneck():
    shapes = {"hta_left": [I], "hta_right": [O], "hta_d": [24]}
    assert sizes(layer_on(bottleneck=0)) == shapes
    more = {"hta_down": [I, 3], "hta_up": [3, O]}
    assert sizes(layer_on(bottleneck=3)) == shapes | more
    assert sizes(layer_on(nn.Linear(O, I)))["hta_d"] == [24]


@pytest.mark.parametrize("reflection", ["literal", "unit"])
@pytest.mark.parametrize("bottleneck", [0, 1, 4])
def test_starts_at_zero_with_live_gradients(reflection, bottleneck):
    layer = layer_on(reflection=reflection, bottleneck=bottleneck).train()
    x = torch.randn(3, 5, I)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).square().sum().backward()
    assert layer.hta_d["default"].grad.abs().min() > 0
    if bottleneck:
        assert layer.hta_up["default"].grad.abs().min() > 0


def test_both_reflections_are_the_same_at_the_start():
    layers = [layer_on(reflection=kind) for kind in ("literal", "unit")]
    for layer in layers:
        with torch.no_grad():
            layer.hta_d["default"].fill_(0.5)
    first, second = (layer.get_delta_weight("default") for layer in layers)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("reflection", ["literal", "unit"])
def test_the_bound_holds(reflection):
    layer = layer_on(reflection=reflection, scale=-2.0)
    stir(layer)
    tensors = {name: c["default"] for name, c in layer.containers()}
    bound = HtaLayer.norm_bound(layer.configs["default"], tensors)
    norm = float(layer.get_delta_weight("default").detach().norm())
    assert 0 < norm <= bound < 20 * norm


def test_convolutions_take_the_update_of_their_flattened_kernels():
    layer = layer_on(nn.Conv2d(6, 8, 3, padding=1, groups=2))
    stir(layer)
    assert layer.get_delta_weight("default").shape == (8, 27)
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        unmerged = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), unmerged)


def test_default_places_are_the_attention_projections(family):
    if family.name == "mlp":
        with pytest.raises(SnellaConfigError, match="has no Linear layer by a usual name"):
            inject_adapter_in_model(HtaConfig(), family.model())
        return
    model = inject_adapter_in_model(HtaConfig(seed=0), family.model())
    ends = {path.removesuffix(".0").rpartition(".")[2] for path, _ in delta_layers(model)}
    assert {"fc1", "fc2"}.isdisjoint(ends)
    assert len(ends) in (4, 8)


def test_settings():
    with pytest.raises(SnellaConfigError, match=r"bottleneck must be 0 to 4, got 5; .* use LoRA"):
        HtaConfig(bottleneck=5)
    with pytest.raises(SnellaConfigError, match="reflection 'half' is unknown; known: literal, un"):
        HtaConfig(reflection="half")
    with pytest.raises(SnellaConfigError, match="r of HTA is 1, got 8: leave it out"):
        HtaConfig(r=8)
