"""A layer whose owner reads its weight past it is no target: its update would have no effect."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import inject_adapter_in_model
from torch import Tensor, nn

from snell_diffusion import SnellaConfig
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.bypass import is_bypassed


class Polite(nn.Module):
    """Asks for a weight's type and dtype, as T5 does, and calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wo = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.wo.weight, Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


class Rude(Polite):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.wo.weight, self.wo.bias)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.attn(x, x, x)[0])


def adapted(model: nn.Module, targets: Any) -> list[str]:
    inject_adapter_in_model(SnellaConfig(r=4, target_modules=targets), model)
    return [path for path, _ in delta_layers(model)]


def test_reading_a_weight_is_told_from_asking_for_its_dtype() -> None:
    assert is_bypassed(Rude(), "wo")
    assert not is_bypassed(Polite(), "wo")
    assert is_bypassed(nn.MultiheadAttention(8, 2), "out_proj")
    assert not is_bypassed(nn.Sequential(nn.Linear(2, 2)), "0")


def test_such_a_target_is_refused() -> None:
    message = (
        r"target module 'attn.out_proj' cannot be adapted: MultiheadAttention reads the layer's "
        r"weight instead of calling it, .*leave it out of target_modules"
    )
    with pytest.raises(SnellaConfigError, match=message):
        adapted(Attending(), ["attn.out_proj"])
    with pytest.raises(SnellaConfigError, match="Rude reads the layer's weight"):
        adapted(nn.Sequential(Rude()), ["wo"])


def test_choosing_all_or_the_usual_layers_leaves_it_out() -> None:
    assert adapted(nn.Sequential(Rude(), Polite()), "all-linear") == ["1.wo"]
    with pytest.raises(SnellaConfigError, match="set target_modules to names of its layers"):
        adapted(nn.Sequential(Rude()), None)


def test_an_adapted_polite_layer_shows() -> None:
    model = nn.Sequential(Polite())
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    assert adapted(model, ["wo"]) == ["0.wo"]
    with torch.no_grad():
        model[0].wo.snella_A["default"].mul_(30)
    assert not torch.allclose(model(x), before)
