"""State dicts that have lost their header."""

import pytest
import torch
from safetensors.torch import load

from snell_diffusion.adapters import read_adapter
from snell_diffusion.adapters.bare import _CHOICES, bare_header, method_settings, method_tensor
from snell_diffusion.adapters.doubles import join_doubles, split_doubles
from snell_diffusion.core import KERNELS, RULES
from snell_diffusion.errors import SnellaKeyError, SnellaSchemaError, SnellaShapeError

METHOD = "unet.snella_method"
PLACE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.snella_"


def test_every_kernel_and_rule_has_a_number() -> None:
    assert set(_CHOICES["snella"]["kernel"] or ()) == set(KERNELS)
    assert set(_CHOICES["snella"]["sparsify"] or ()) == set(RULES)


def test_numbers_never_move() -> None:
    config = {"kernel": "linear", "p": 1.5, "sparsify": "soft", "scale": -0.5}
    tensor = method_tensor("snella", config, "x")
    assert join_doubles(tensor, "x").tolist() == [2.0, 1.5, 3.0, -0.5]
    assert method_settings("snella", tensor, "x") == config


@pytest.mark.parametrize("number", [-1.0, 3.0, 0.5, 1e30])
def test_a_number_that_stands_for_nothing_is_refused(number: float) -> None:
    numbers = split_doubles(torch.tensor([number, 2.0, 0.0, 1.0], dtype=torch.float64), "x")
    with pytest.raises(SnellaSchemaError, match=r"kernel: expected 0 to 2 .mixed.*got"):
        method_settings("snella", numbers, "x")


@pytest.mark.parametrize("shape", [(3, 3), (4,), (4, 2), (1, 4, 3)])
def test_a_method_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SnellaSchemaError, match=r"expected shape \[4, 3\] .kernel, p"):
        method_settings("snella", torch.zeros(shape), "x")


def test_bare_tensors_of_a_file_tell_the_same_as_its_header(adapter_bytes: bytes) -> None:
    whole, bare = read_adapter(adapter_bytes), read_adapter(load(adapter_bytes))
    assert bare.digest is None
    for name, part in whole.header.components.items():
        twin = bare.header.components[name]
        assert dict(sorted(part.layers.items())) == dict(sorted(twin.layers.items()))
        assert twin.base is None
        assert twin.config.items() <= part.config.items()


def test_foreign_tensors_are_refused() -> None:
    lora = {"unet.to_q.lora_A.weight": torch.zeros(2, 2)}
    with pytest.raises(
        SnellaKeyError, match=r"expected a tensor '<component>.snella_method' .* among 'unet.to"
    ):
        bare_header(lora, "x")
    with pytest.raises(SnellaKeyError, match="among nothing"):
        bare_header({}, "x")


def test_settings_without_layers_are_refused(adapter_bytes: bytes) -> None:
    only = {METHOD: load(adapter_bytes)[METHOD]}
    with pytest.raises(
        SnellaKeyError, match=r"'unet': expected tensors of layers .* settings alone"
    ):
        bare_header(only, "x")


def test_half_a_layer_is_refused(adapter_bytes: bytes) -> None:
    tensors = load(adapter_bytes)
    del tensors[PLACE + "B"]
    with pytest.raises(SnellaKeyError, match=r"_sparsity, unet.*to_q.snella_B missing; part"):
        bare_header(tensors, "x")


def test_flat_factors_are_refused(adapter_bytes: bytes) -> None:
    tensors = load(adapter_bytes)
    tensors[PLACE + "A"] = torch.zeros(4, 4)
    with pytest.raises(SnellaShapeError, match=r"expected shapes \[heads, in, columns\]"):
        bare_header(tensors, "x")


@pytest.mark.parametrize("short", ["sparsity", "threshold"])
def test_a_level_of_another_shape_is_refused(short: str, adapter_bytes: bytes) -> None:
    tensors = load(adapter_bytes)
    tensors[PLACE + short] = torch.zeros(5, 3)
    with pytest.raises(SnellaShapeError, match=rf"snella_{short}': expected shape .* got \[5, 3\]"):
        bare_header(tensors, "x")


def test_hundreds_of_components_are_refused_before_they_are_looked_at() -> None:
    method = method_tensor(
        "snella", {"kernel": "mixed", "p": 2.0, "sparsify": "mask", "scale": 1.0}, "x"
    )
    tensors = {f"c{index}.snella_method": method for index in range(17)}
    with pytest.raises(SnellaKeyError, match="1 to 16 components, got 17"):
        bare_header(tensors, "x")


def test_a_layer_without_inputs_is_refused(adapter_bytes: bytes) -> None:
    tensors = load(adapter_bytes)
    tensors[PLACE + "A"] = torch.zeros(2, 0, 2)
    with pytest.raises(SnellaSchemaError, match=r"to_q.shape': expected sizes from 1 .*\[32, 0\]"):
        read_adapter(tensors)
