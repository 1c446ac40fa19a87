"""Which tensors belong to a run, and how they are put back."""

import pytest
import torch

from snell_diffusion.training.adapter_tensors import (
    adapter_tensors,
    adapters_off,
    copy_adapter_tensors,
    evaluating,
    trainable_parameters,
    tuner_layers,
)
from snell_diffusion.training.errors import CheckpointError
from tests.training.models import Net, adapted


def test_names_are_component_module_and_tensor() -> None:
    assert [name for name, _ in tuner_layers(adapted())] == ["net.first", "net.second"]
    names = set(adapter_tensors(adapted()))
    assert {"net.first.snella_A.default", "net.second.snella_sparsity.default"} <= names
    assert not any("base_layer" in name for name in names)
    assert set(adapter_tensors(adapted("lora"))) == {
        f"net.{layer}.lora_{side}.default.weight" for layer in ("first", "second") for side in "AB"
    }


def test_copy_sets_everything_in_place() -> None:
    source, target = adapted(seed=1), adapted(seed=2)
    x = torch.randn(3, 6)
    with evaluating(source), evaluating(target):
        assert not torch.equal(source["net"](x), target["net"](x))
        target["net"].load_state_dict(
            {k: v for k, v in source["net"].state_dict().items() if "base_layer" in k}, strict=False
        )
        copy_adapter_tensors(target, adapter_tensors(source))
        assert torch.equal(source["net"](x), target["net"](x))


def test_copy_refuses_other_names_and_shapes_before_it_changes_anything() -> None:
    model = adapted()
    before = {k: v.detach().clone() for k, v in adapter_tensors(model).items()}
    with pytest.raises(CheckpointError, match="does not fit this model: 1 tensors differ"):
        copy_adapter_tensors(model, dict(list(before.items())[1:]))
    last = list(before)[-1]
    wrong = {k: v + 1 for k, v in before.items()} | {last: torch.zeros(9, 9)}
    with pytest.raises(CheckpointError, match=rf"{last} has shape \(9, 9\)"):
        copy_adapter_tensors(model, wrong)
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_adapters_off_is_the_base_and_comes_back() -> None:
    model = adapted("lora")
    x = torch.randn(3, 6)
    torch.manual_seed(0)
    base = Net()
    trainable = set(trainable_parameters(model))
    with evaluating(model):
        with adapters_off(model):
            assert torch.equal(model["net"](x), base(x))
        assert not torch.equal(model["net"](x), base(x))
    assert set(trainable_parameters(model)) == trainable
    assert model["net"].training
