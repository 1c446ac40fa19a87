"""A normal LoRA on the same layers, before and after ours: the sum of both updates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion import SnellaAttnProcessor
from tests.registry.made import Made, with_weights
from tests.registry.record import TinyFamily, predict

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def add_lora(model: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    """A LoRA on some layers, with its updates by layer path."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=paths, init_lora_weights=False)
    if hasattr(model, "add_adapter"):
        model.add_adapter(config, "lora")
    else:
        inject_adapter_in_model(config, model, "lora")
    return {
        path.replace(".base_layer", ""): layer.get_delta_weight("lora").detach()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def both(family: TinyFamily, made: Made, lora: dict[str, Tensor]) -> Tensor:
    deltas = {path: delta + lora.get(path, 0.0) for path, delta in made.deltas["b"].items()}
    return predict(family, with_weights(family, {**lora, **deltas}))


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["lora", "snella"])
def test_the_updates_add_up(made: Made, first: str) -> None:
    family = made.family
    pipe = family.pipe()
    model = getattr(pipe, family.component)
    paths = list(made.deltas["b"])
    if first == "snella":
        pipe.load_snella_weights(made.files["b"], "ours")
    lora = add_lora(model, paths)
    if first == "lora":
        pipe.load_snella_weights(made.files["b"], "ours")
    activate(model, ["ours", "lora"])
    expected = both(family, made, lora)
    assert not close(expected, made.merged({"b": 1.0}))
    assert close(predict(family, model), expected)
    pipe.fuse_snella()
    assert close(predict(family, model), expected)
    pipe.unfuse_snella()
    pipe.unload_snella_weights()
    assert close(predict(family, model), predict(family, with_weights(family, lora)))


def activate(model: nn.Module, names: list[str]) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)


@pytest.mark.parametrize("name", ["unet_sd15", "flux", "qwen_image"])
def test_with_processors(name: str, made_for: Callable[[str], Made]) -> None:
    made = made_for(name)
    family = made.family
    pipe = family.pipe()
    model: Any = getattr(pipe, family.component)
    pipe.load_snella_weights(made.files["b"], "ours")
    SnellaAttnProcessor.install(model)
    lora = add_lora(model, list(made.deltas["b"]))
    expected = both(family, made, lora)
    activate(model, ["ours", "lora"])
    assert close(predict(family, model), expected)
