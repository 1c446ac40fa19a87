"""State dicts that have lost their header."""

import math

import pytest
import torch
from safetensors.torch import load

from snell_diffusion.adapters import read_adapter
from snell_diffusion.adapters.bare import _CHOICES, bare_header, method_settings, method_tensor
from snell_diffusion.core import KERNELS, RULES
from snell_diffusion.errors import SnellaKeyError, SnellaSchemaError, SnellaShapeError

METHOD = "unet.snella_method"
PLACE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.snella_"


def test_every_kernel_and_rule_has_a_number() -> None:
    assert set(_CHOICES["snella"]["kernel"] or ()) == set(KERNELS)
    assert set(_CHOICES["snella"]["sparsify"] or ()) == set(RULES)


def test_numbers_never_move() -> None:
    config = {"kernel": "linear", "p": 1.5, "sparsify": "soft", "scale": -0.5}
    assert method_tensor("snella", config).tolist() == [2.0, 1.5, 3.0, -0.5]
    assert method_settings("snella", method_tensor("snella", config), "x") == config


@pytest.mark.parametrize("number", [-1.0, 3.0, 0.5, math.inf])
def test_a_number_that_stands_for_nothing_is_refused(number: float) -> None:
    numbers = torch.tensor([number, 2.0, 0.0, 1.0], dtype=torch.float64)
    with pytest.raises(SnellaSchemaError, match=r"kernel is .*, expected 0 to 2 .mixed"):
        method_settings("snella", numbers, "x")


def test_a_method_tensor_of_another_length_is_refused() -> None:
    with pytest.raises(SnellaSchemaError, match=r"shape \(3,\), expected 4 numbers"):
        method_settings("snella", torch.zeros(3, dtype=torch.float64), "x")


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
        SnellaKeyError, match=r"no tensor '<component>.snella_method' among unet.to"
    ):
        bare_header(lora, "x")
    with pytest.raises(SnellaKeyError, match="among nothing"):
        bare_header({}, "x")


def test_settings_without_layers_are_refused(adapter_bytes: bytes) -> None:
    only = {METHOD: load(adapter_bytes)[METHOD]}
    with pytest.raises(SnellaKeyError, match="'unet' has settings but no layer tensors"):
        bare_header(only, "x")


def test_half_a_layer_is_refused(adapter_bytes: bytes) -> None:
    tensors = load(adapter_bytes)
    del tensors[PLACE + "B"]
    with pytest.raises(SnellaKeyError, match=r"tensors missing: .*to_q.snella_B"):
        bare_header(tensors, "x")


def test_flat_factors_are_refused(adapter_bytes: bytes) -> None:
    tensors = load(adapter_bytes)
    tensors[PLACE + "A"] = torch.zeros(4, 4)
    with pytest.raises(SnellaShapeError, match=r"expected \[heads, in, columns\]"):
        bare_header(tensors, "x")
