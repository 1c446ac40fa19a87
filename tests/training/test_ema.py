"""The average follows its formula and takes the levels over."""

import torch

from snell_diffusion.training.adapter_tensors import adapter_tensors
from snell_diffusion.training.ema import AdapterEma
from tests.training.models import adapted


def test_average_follows_the_formula() -> None:
    model = adapted()
    parameter = model["net"].first.snella_A["default"]
    ema = AdapterEma(model, decay=0.5)
    expected = parameter.detach().double().clone()
    for step in range(1, 8):
        with torch.no_grad():
            parameter.add_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    shadow = ema.shadow["net.first.snella_A.default"].double()
    torch.testing.assert_close(shadow, expected, rtol=1e-6, atol=1e-6)


def test_levels_are_copied_not_averaged() -> None:
    model = adapted()
    ema = AdapterEma(model, decay=0.99)
    model["net"].first.set_sparsity("default", 0.75)
    ema.update(1)
    assert ema.shadow["net.first.snella_sparsity.default"] == 0.75


def test_applied_swaps_weights_and_levels_and_gives_them_back() -> None:
    model = adapted()
    layer = model["net"].first
    ema = AdapterEma(model, decay=0.99)
    with torch.no_grad():
        layer.snella_A["default"].add_(1)
    layer.set_sparsity("default", 0.5)
    live = {k: v.detach().clone() for k, v in adapter_tensors(model).items()}
    model["net"].eval()
    with torch.no_grad():
        before = layer(torch.ones(1, 6))
        with ema.applied():
            assert layer.sparsity("default") == 0.0
            assert not torch.equal(layer(torch.ones(1, 6)), before)
        assert torch.equal(layer(torch.ones(1, 6)), before)
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(tensor.nan_to_num(), live[name].nan_to_num())
    assert layer.sparsity("default") == 0.5


def test_load_restores_the_average() -> None:
    model = adapted()
    ema, other = AdapterEma(model, 0.9), AdapterEma(model, 0.9)
    with torch.no_grad():
        model["net"].first.snella_A["default"].add_(1)
    ema.update(1)
    other.load(ema.shadow)
    for name, tensor in ema.shadow.items():
        assert torch.equal(other.shadow[name].nan_to_num(), tensor.nan_to_num())
