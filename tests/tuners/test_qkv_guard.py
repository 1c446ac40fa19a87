"""QKV fusion never drops an update without a word."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from snell_diffusion import SnellaConfig
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.qkv_guard import is_fused, protect, release
from tests.tiny_models import DENOISERS, adapt, predict, text_encoder

FUSIBLE = ["sd15", "sdxl", "sd3", "flux"]


@pytest.mark.parametrize("family", FUSIBLE)
def test_fusing_an_adapted_model_is_refused_and_changes_nothing(family: str) -> None:
    model = adapt(DENOISERS[family]())
    expected = predict(model, family)
    message = r"fuse_qkv_projections\(\) would leave out the updates of \d+ layers \(.*fuse_snella"
    with pytest.raises(SnellaValueError, match=message):
        model.fuse_qkv_projections()
    assert not is_fused(model)
    assert torch.equal(predict(model, family), expected)


@pytest.mark.parametrize("family", FUSIBLE)
def test_one_attention_cannot_be_fused_either(family: str) -> None:
    model = adapt(DENOISERS[family]())
    attn = next(module for module in model.modules() if hasattr(module, "to_q"))
    with pytest.raises(SnellaValueError, match=r"fuse_projections\(\) would leave out the updates"):
        attn.fuse_projections()


@pytest.mark.parametrize("family", FUSIBLE)
def test_merged_updates_survive_the_fusion(family: str) -> None:
    model = adapt(DENOISERS[family]())
    expected = predict(model, family)
    for _, layer in delta_layers(model):
        layer.merge()
    model.fuse_qkv_projections()
    assert is_fused(model)
    torch.testing.assert_close(predict(model, family), expected, rtol=1e-3, atol=1e-4)
    model.unfuse_qkv_projections()
    assert not is_fused(model)
    torch.testing.assert_close(predict(model, family), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["inject", "add_adapter", "get_peft_model"])
def test_every_way_into_a_model_is_guarded(way: str) -> None:
    model = DENOISERS["sd15"]()
    config = SnellaConfig(r=4)
    if way == "inject":
        inject_adapter_in_model(config, model)
    elif way == "add_adapter":
        model.add_adapter(config)
    else:
        get_peft_model(model, config)
    with pytest.raises(SnellaValueError, match="would leave out the updates of 32 layers"):
        model.fuse_qkv_projections()


def test_an_unadapted_model_fuses_as_ever() -> None:
    model = DENOISERS["sd15"]()
    expected = predict(model, "sd15")
    protect(model)
    model.fuse_qkv_projections()
    assert is_fused(model)
    torch.testing.assert_close(predict(model, "sd15"), expected, rtol=1e-3, atol=1e-4)


def test_a_copy_guards_itself() -> None:
    model = adapt(DENOISERS["sd15"]())
    twin = copy.deepcopy(model)
    for _, layer in delta_layers(model):
        layer.merge()
    model.fuse_qkv_projections()
    with pytest.raises(SnellaValueError, match="would leave out"):
        twin.fuse_qkv_projections()


def test_release_leaves_no_trace() -> None:
    def own(model: nn.Module) -> list[Any]:
        return [sorted(vars(module)) for module in model.modules()]

    model = DENOISERS["flux"]()
    before = own(model)
    protect(model)
    assert own(model) != before
    release(model)
    assert own(model) == before


def test_layers_held_by_a_hook_count() -> None:
    model = adapt(DENOISERS["sd15"]())
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn1
    delta = attn.to_q
    attn.to_q = delta.base_layer

    class Holder:
        def __init__(self) -> None:
            self.deltas = {"to_q": delta}

        def __call__(self, module: nn.Module, args: Any) -> None:
            pass

    for _, layer in delta_layers(model):
        layer.merge()
    model.fuse_qkv_projections()
    attn.register_forward_pre_hook(Holder())
    message = r"updates of 1 layers \(mid_block.attentions.0.transformer_blocks.0.attn1.to_q\)"
    with pytest.raises(SnellaValueError, match=message):
        model.fuse_qkv_projections()


def test_an_adapted_model_is_not_saved_under_names_nobody_finds(tmp_path: Path) -> None:
    model = adapt(DENOISERS["sd15"]())
    with pytest.raises(SnellaValueError, match=r"would write 32 adapted layers .*save_snella_wei"):
        model.save_pretrained(tmp_path)
    for _, layer in delta_layers(model):
        layer.merge()
    with pytest.raises(SnellaValueError, match="under names that from_pretrained"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_delta_layers_saving_works_as_ever(tmp_path: Path) -> None:
    model = DENOISERS["sd15"]()
    protect(model)
    plain = type(model).save_pretrained.__get__(model)
    assert inspect.signature(model.save_pretrained) == inspect.signature(plain)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(predict(again, "sd15"), predict(model, "sd15"))


def test_transformers_saves_adapters_its_own_way(tmp_path: Path) -> None:
    encoder = text_encoder()
    encoder.add_adapter(SnellaConfig(r=4))
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
