"""Saved and read again."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTForImageClassification

from snell_diffusion.compress import (
    compress,
    load_compressed,
    low_rank_layers,
    save_compressed,
    tuner_targets,
)
from snell_diffusion.errors import SnellaFileError, SnellaValueError
from tests.compress.models import pixels, small_vit
from tests.tiny_models import DENOISERS, predict


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small_vit()
    compress(model, 2)
    return save_compressed(model, tmp_path / "half", 2)


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_a_vit_comes_back(saved: Path) -> None:
    model = small_vit()
    compress(model, 2)
    again = load_compressed(saved)
    assert type(again) is ViTForImageClassification
    assert not again.training
    torch.testing.assert_close(again(pixels()).logits, model(pixels()).logits, rtol=0, atol=0)
    assert [p for p, _ in low_rank_layers(again)] == [p for p, _ in low_rank_layers(model)]
    assert sorted(p.name for p in saved.iterdir()) == [
        *("compression.json", "config.json", "model.safetensors"),
    ]


@pytest.mark.parametrize("family", DENOISERS)
def test_a_denoiser_comes_back(family: str, tmp_path: Path) -> None:
    model = DENOISERS[family]()
    compress(model, 2)
    again = load_compressed(save_compressed(model, tmp_path, 2))
    assert type(again) is type(model)
    torch.testing.assert_close(predict(again, family), predict(model, family), rtol=0, atol=0)


def test_half_precision_files_are_half_as_large(saved: Path, tmp_path: Path) -> None:
    model = small_vit()
    compress(model, 2)
    half = save_compressed(model, tmp_path / "f16", 2, torch.float16)
    assert next(model.parameters()).dtype == torch.float32  # untouched
    assert {t.dtype for t in load_file(half / "model.safetensors").values()} == {torch.float16}
    again = load_compressed(half)
    assert next(again.parameters()).dtype == torch.float32
    torch.testing.assert_close(again(pixels()).logits, model(pixels()).logits, rtol=0.02, atol=0.02)
    assert next(load_compressed(saved, torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_what_cannot_be_saved(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(SnellaValueError, match="no compressed layer"):
        save_compressed(small_vit(), tmp_path / "a", 2)
    plain = nn.Sequential(nn.Linear(32, 32))
    compress(plain, 2)
    with pytest.raises(SnellaValueError, match="only classes of transformers and diffusers"):
        save_compressed(plain, tmp_path / "b", 2)
    model = small_vit()
    compress(model, 2)
    with pytest.raises(SnellaFileError, match="new or empty folder"):
        save_compressed(model, saved, 2)
    targets = tuner_targets(model, ["q_proj"], whole=False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    with pytest.raises(SnellaValueError, match="has an adapter"):
        save_compressed(model, tmp_path / "c", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 1 was expected, got 2"),
        ({"library": "os"}, "library must be one of transformers, diffusers"),
        ({"class": "PreTrainedTokenizer"}, "transformers has no model class"),
        ({"class": "NoSuchViT"}, "transformers has no model class 'NoSuchViT'"),
        ({"ranks": {"vit.nowhere": 4}}, "a Linear was expected at vit.nowhere"),
        ({"ranks": {"vit.layers.0.mlp.fc1": 400}}, "must be 1 to 32, got 400"),
        ({"ranks": {"vit.layers.0.mlp.fc1": "4"}}, "table of whole numbers"),
        ({"ranks": {}}, "model.safetensors does not fit this model"),
    ],
)
def test_descriptions_that_do_not_fit(saved: Path, changes: dict, message: str) -> None:
    edit(saved / "compression.json", **changes)
    with pytest.raises(SnellaFileError, match=message):
        load_compressed(saved)


def test_damaged_folders(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SnellaFileError, match=r"no compressed model: it has no compression\.json"):
        load_compressed(tmp_path / "nowhere")
    weights = load_file(saved / "model.safetensors")
    name = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != name}, saved / "model.safetensors")
    with pytest.raises(SnellaFileError, match="does not fit this model"):
        load_compressed(saved)
    (saved / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(SnellaFileError, match="does not fit this model"):
        load_compressed(saved)
    (saved / "config.json").write_text("[1]")
    with pytest.raises(SnellaFileError, match="must hold a table"):
        load_compressed(saved)


def test_stock_loader_does_not_take_it_for_an_ordinary_model(tmp_path: Path) -> None:
    """A folder that stock code would load with random layers must not look like one."""
    model = DENOISERS["sd15"]()
    compress(model, 2)
    folder = save_compressed(model, tmp_path, 2)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
