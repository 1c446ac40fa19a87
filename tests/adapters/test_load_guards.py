"""What a file must not reach, and which updates are out of proportion."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from snell_diffusion.adapters import AdapterFile, load_adapter, read_adapter
from snell_diffusion.errors import SnellaKeyError, SnellaValueError
from tests.adapters.files import rebuilt
from tests.tiny_models import predict, sd15_unet, text_encoder

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Components = dict[str, nn.Module]


@pytest.fixture
def components() -> Components:
    return {"unet": sd15_unet(), "text_encoder": text_encoder()}


@pytest.fixture(scope="module")
def expected(adapted: Components) -> Tensor:
    return predict(adapted["unet"], "sd15")


def test_no_file_adapts_another_adapter(adapter_file: AdapterFile, components: Components) -> None:
    """A LoRA's own matrices are Linears inside the model, and a file could name them."""
    unet = components["unet"]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    inner = f"{LAYER}.lora_A.lora"
    assert isinstance(unet.get_submodule(inner), nn.Linear)
    part = adapter_file.header.components["unet"]
    row = part.layers[LAYER].model_copy(update={"shape": [2, 32]})
    header = adapter_file.header.model_copy(
        update={"components": {"unet": part.model_copy(update={"layers": {inner: row}})}}
    )
    with pytest.raises(SnellaKeyError, match=r"got 1 of 1 that are none: .*lora_A.lora"):
        load_adapter(components, AdapterFile(header, {}, "x", None), "mine")


def test_entries_that_a_threshold_hides_are_checked_too(
    adapter_bytes: bytes, components: Components
) -> None:
    """`set_snella_sparsity` could bring them back after the load."""

    def hide(header: dict[str, Any]) -> None:
        header["components"]["unet"]["layers"][LAYER]["threshold"] = 2.0**100

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[f"unet.{LAYER}.snella_A"] *= 1e8
        tensors[f"unet.{LAYER}.snella_threshold"] = torch.tensor(2.0**100)

    file = read_adapter(rebuilt(adapter_bytes, hide, enlarge))
    with pytest.raises(SnellaValueError, match=r"to_q: expected an update at most 100"):
        load_adapter(components, file)


def test_equal_entries_are_checked_too(adapter_bytes: bytes, components: Components) -> None:
    """Every sparsity level drops them all, level 0 too; a stored threshold below them does not."""

    def keep(header: dict[str, Any]) -> None:
        header["components"]["unet"]["layers"][LAYER]["threshold"] = 0.0

    def flatten(tensors: dict[str, Tensor]) -> None:
        for name, value in (("A", 1e4), ("B", 3e4), ("signs", 1.0)):
            tensors[f"unet.{LAYER}.snella_{name}"].fill_(value)
        tensors[f"unet.{LAYER}.snella_threshold"] = torch.tensor(0.0)

    file = read_adapter(rebuilt(adapter_bytes, keep, flatten))
    with pytest.raises(SnellaValueError, match=r"to_q: expected an update at most 100"):
        load_adapter(components, file)


def test_equal_entries_that_a_threshold_hides_are_checked_too(
    adapter_bytes: bytes, components: Components
) -> None:
    """Every level drops the smallest entries, so of equal ones all of them."""

    def hide(header: dict[str, Any]) -> None:
        header["components"]["unet"]["layers"][LAYER]["threshold"] = 2.0**100

    def enlarge(tensors: dict[str, Tensor]) -> None:
        place = f"unet.{LAYER}.snella_"
        tensors[place + "A"].zero_()
        tensors[place + "B"].zero_()
        tensors[place + "beta"].fill_(1e6)
        tensors[place + "threshold"] = torch.tensor(2.0**100)

    file = read_adapter(rebuilt(adapter_bytes, hide, enlarge))
    with pytest.raises(SnellaValueError, match=r"to_q: expected an update at most 100"):
        load_adapter(components, file)


def test_an_update_beyond_the_range_of_a_16_bit_base_is_refused(
    adapter_bytes: bytes,
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[f"unet.{LAYER}.snella_beta"] = torch.tensor([1e3])

    components = {"unet": sd15_unet().half(), "text_encoder": text_encoder()}
    file = read_adapter(rebuilt(adapter_bytes, tensors=enlarge))
    with pytest.raises(SnellaValueError, match=r"expected an update of finite torch.float16 numb"):
        load_adapter(components, file, max_relative_update=1e30)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_the_bound_is_a_positive_number(
    bound: float, adapter_file: AdapterFile, components: Components
) -> None:
    with pytest.raises(SnellaValueError, match="max_relative_update: expected a number above 0"):
        load_adapter(components, adapter_file, max_relative_update=bound)


class Packed(nn.Linear):
    """Stands in for quantized Linears: the weight is not the matrix it multiplies by."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.dense = linear.weight.detach()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense)


def pack(unet: nn.Module) -> None:
    parent = unet.get_submodule(LAYER.rpartition(".")[0])
    parent.to_q = Packed(parent.to_q)


def test_a_quantized_base_takes_an_adapter(
    adapter_file: AdapterFile, components: Components, expected: Tensor
) -> None:
    pack(components["unet"])
    load_adapter(components, adapter_file)
    torch.testing.assert_close(predict(components["unet"], "sd15"), expected, rtol=1e-4, atol=1e-5)


def test_an_update_on_quantized_weights_is_bounded_too(
    adapter_bytes: bytes, components: Components
) -> None:
    """They count as far larger than any real weight; an update beyond even that is damage."""
    pack(components["unet"])

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[f"unet.{LAYER}.snella_beta"] = torch.tensor([1e3])

    with pytest.raises(
        SnellaValueError, match=r"to_q: expected an update at most 100 times as larg"
    ):
        load_adapter(components, read_adapter(rebuilt(adapter_bytes, tensors=enlarge)))
