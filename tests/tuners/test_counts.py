"""Trainable parameters and stored bytes on a real-size ViT-B/16, as the papers' methods have them.

The base is on the meta device: nothing of it is stored. Head and class token are not counted.
"""

import pytest
import safetensors.torch
import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from snell_diffusion.adapters.write import adapter_file_bytes
from snell_diffusion.core.quantize import encode
from snell_diffusion.tuners import METHODS, delta_layers, delta_parameters
from snell_diffusion.tuners.placement import linears
from snell_diffusion.tuners.recipes import recipe
from snell_diffusion.tuners.roles import ROLES, role_of

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "fc1", "fc2"]


@pytest.fixture
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        return ViTModel(ViTConfig(), add_pooling_layer=False).requires_grad_(False)


def adapted(model: nn.Module, name: str, targets: list[str] = ALL, **settings) -> nn.Module:
    config = recipe(name).config(settings, targets, 0, "vision")
    return inject_adapter_in_model(config, model)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_base_is_the_one_the_counts_are_of(vit):
    layers = [vit.get_submodule(path) for path in linears(vit) if role_of(path)]
    assert len(layers) == 72
    assert sum(layer.weight.numel() for layer in layers) == 84_934_656
    assert {role_of(path) for path in linears(vit)} == set(ROLES)


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("lora", {"rank": 8}, 1_327_104),
        ("klora", {"rank": 8}, 1_327_104),
        ("klora", {"rank": 32}, 5_308_416),
        ("mixk", {"rank": 32}, 5_308_632),
        ("snell", {"rank": 8}, 1_327_104),
        ("snell", {"rank": 16}, 2_654_208),
        ("snell", {"rank": 32}, 5_308_416),
        ("snella", {"rank": 32, "train_beta": True}, 5_308_632),
        ("spt_lora", {"rank": 8}, 1_327_104),
        ("spt_adapter", {"rank": 8}, 1_410_624),
        ("arc", {"rank": 50}, 96_432),
        ("hta", {"bottleneck": 1}, 184_320),
        ("hta", {"bottleneck": 0}, 110_592),
        ("binary_lora", {"rank": 32}, 1_179_648),
        ("binary_adapter", {"rank": 32}, 589_824),
    ],
    ids=str,
)
def test_trainable_parameters(vit, name, settings, count):
    assert trained(adapted(vit, name, **settings)) == count


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.config.default_roles])
def test_the_papers_places_without_any_targets(vit, name):
    config = METHODS[name].config()
    inject_adapter_in_model(config, vit)
    counts = {"HTA": 184_320, "ARC": 96_432, "BINARY_LORA": 1_179_648, "BINARY_ADAPTER": 589_824}
    counts |= {"SPT_LORA": 1_327_104, "SPT_ADAPTER": 1_410_624}
    assert trained(vit) == counts[name]


def test_arc_at_the_attention_alone(vit):
    config = METHODS["ARC"].config(target_modules=ATTENTION[:3])
    assert trained(inject_adapter_in_model(config, vit)) == 48_216


def test_one_block_of_snella(vit):
    model = adapted(vit, "snella", rank=32, train_beta=True)
    block = {n: p for n, p in delta_parameters(model, "default").items() if "layers.7." in n}
    assert sum(p.numel() for p in block.values()) == 442_386


@pytest.mark.parametrize(
    ("name", "rank", "stored"),
    [
        ("binary_lora", 32, 147_840),
        ("binary_adapter", 32, 73_920),
        ("binary_lora", 1, 4_992),
    ],
)
def test_stored_bytes_of_one_bit_adapters(vit, name, rank, stored):
    model = adapted(vit, name, rank=rank)
    matrices = delta_parameters(model, "default")
    config = next(delta_layers(model))[1].configs["default"]
    assert config.stored_bytes(*(m.numel() for m in matrices.values())) == stored
    encoded = [encode(matrix, 1) for matrix in matrices.values()]
    assert sum(codes.nbytes + stats.nbytes for codes, stats in encoded) == stored
    file = safetensors.torch.load(adapter_file_bytes({"vit": model}))
    assert sum(tensor.nbytes for tensor in file.values()) == stored


# Beside the trained numbers, a file of SNELLA and its kin holds per layer the signs of two heads in
# float32 and the sparsity level as three float32 parts, and once the method's settings.
SETTLED = 72 * (2 * 4 + 3 * 4) + 48


@pytest.mark.parametrize(
    ("name", "settings", "dtype", "stored"),
    [
        ("klora", {"rank": 8}, None, 5_308_416 + SETTLED),
        ("klora", {"rank": 32}, None, 21_233_664 + SETTLED),
        ("mixk", {"rank": 32}, None, 21_234_528 + SETTLED),
        ("snell", {"rank": 32}, None, 21_233_664 + SETTLED),
        ("snella", {"rank": 32, "train_beta": True}, None, 21_234_528 + SETTLED),
        # The factors are halved; the three numbers of each layer stay in float32.
        ("snella", {"rank": 32, "train_beta": True}, torch.float16, 10_617_696 + SETTLED),
        ("arc", {"rank": 50}, None, 385_728),
        ("hta", {"bottleneck": 1}, None, 737_280),
        ("hta", {"bottleneck": 0}, None, 442_368),
        ("spt_lora", {"rank": 8}, None, 5_308_416),
        ("spt_adapter", {"rank": 8}, None, 5_642_496),
    ],
    ids=str,
)
def test_stored_bytes_of_plain_numbers(vit, name, settings, dtype, stored):
    """All tensors of the file, beside its header."""
    model = adapted(vit, name, **settings)
    file = safetensors.torch.load(adapter_file_bytes({"vit": model}, dtype=dtype))
    assert sum(tensor.nbytes for tensor in file.values()) == stored


def test_stored_bytes_of_a_lora(vit):
    state = get_peft_model_state_dict(adapted(vit, "lora", rank=8), adapter_name="default")
    assert len(state) == 2 * 72
    assert sum(tensor.nbytes for tensor in state.values()) == 5_308_416
