"""Paths of delta layers, whatever wraps the model."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from snell_diffusion.tuners import SnellaConfig, delta_buffers, delta_layers, delta_parameters
from snell_diffusion.tuners.traverse import every_module

CONFIG = SnellaConfig.paper(r=4, target_modules=["to_q", "out.0"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.out = nn.Sequential(nn.Linear(8, 8))


def model() -> nn.Module:
    return nn.ModuleDict({"b": Block(), "a": Block()})


PATHS = ["b.to_q", "b.out.0", "a.to_q", "a.out.0"]


def paths(model, adapter=None):
    return [path for path, _ in delta_layers(model, adapter)]


def test_paths_are_the_base_models_in_its_order():
    plain = model()
    inject_adapter_in_model(CONFIG, plain)
    assert paths(plain) == PATHS
    assert paths(get_peft_model(model(), CONFIG)) == PATHS
    assert paths(get_peft_model(model(), CONFIG).base_model) == PATHS
    assert paths(torch.compile(plain, backend="eager")) == PATHS
    assert paths(model()) == []


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_nested_tuners_leave_no_trace_in_the_paths():
    nested = model()
    inject_adapter_in_model(CONFIG, nested, "one")
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), nested, "lora")
    inject_adapter_in_model(SnellaConfig.paper(r=4, target_modules=["to_q"]), nested, "two")
    assert paths(nested) == ["b.to_q", "b.to_q", "b.out.0", "a.to_q", "a.to_q", "a.out.0"]
    assert paths(nested, "one") == PATHS
    assert paths(nested, "two") == ["b.to_q", "a.to_q"]
    assert paths(nested, "lora") == []


def test_tensors_by_name_are_what_an_average_must_copy():
    adapted = get_peft_model(model(), CONFIG)
    parameters = delta_parameters(adapted, "default")
    buffers = delta_buffers(adapted, "default")
    assert {name for name in parameters if name.startswith("b.to_q.")} == {
        f"b.to_q.snella_{name}" for name in ("A", "B", "alpha", "gamma", "beta")
    }
    assert {name for name in buffers if name.startswith("b.to_q.")} == {
        f"b.to_q.snella_{name}" for name in ("signs", "sparsity", "threshold")
    }
    other = get_peft_model(model(), CONFIG)
    next(delta_layers(adapted))[1].set_sparsity("default", 0.75)
    with torch.no_grad():
        for name, parameter in delta_parameters(other, "default").items():
            parameter.copy_(parameters[name])
        for name, buffer in delta_buffers(other, "default").items():
            buffer.copy_(buffers[name])
    for (_, left), (_, right) in zip(delta_layers(adapted), delta_layers(other), strict=True):
        assert right.sparsity("default") == left.sparsity("default")
        assert torch.equal(right.get_delta_weight("default"), left.get_delta_weight("default"))


def test_a_peft_model_of_a_peft_adapter_without_deltas():
    lora = get_peft_model(model(), LoraConfig(target_modules=["to_q"]))
    assert isinstance(lora, PeftModel)
    assert paths(lora) == []


def test_every_module_comes_once_in_the_order_of_modules():
    tree = model()
    tree["b"].again = tree["a"].out  # reached twice
    tree["b"].nothing = None
    tree["b"].register_module("empty", None)
    inject_adapter_in_model(CONFIG, tree, "x")
    assert list(every_module(tree)) == list(tree.modules())
