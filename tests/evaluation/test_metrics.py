"""CLIP, DINO and diversity with tiny random models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from snell_diffusion.errors import SnellaBaseError
from snell_diffusion.evaluation.__main__ import main
from snell_diffusion.evaluation.metrics import (
    Clip,
    ImageFeatures,
    cosine_distance,
    diversity,
    likeness,
    obedience,
    root_mean_square,
)
from snell_diffusion.evaluation.records import read_records
from tests import tiny_models
from tests.evaluation.plans import command, write_plan

CPU = torch.device("cpu")
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
VISION = {**TINY, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP as a folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**TINY, "num_attention_heads": 2, "vocab_size": 190, "max_position_embeddings": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(
        folder
    )
    tiny_models.tokenizer().save_pretrained(folder)
    side = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ViT as a folder, as DINO's published weights are."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    ViTModel(ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def noise(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (20 + i, 24, 3), np.uint8)) for i in range(count)
    ]


def test_clip_features_are_those_of_its_own_parts(clip: Path) -> None:
    model = Clip(str(clip), CPU)
    pictures = noise(3)
    found = model(pictures)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(pictures, return_tensors="pt")
    parts = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        pooled = parts.vision_model(pixels["pixel_values"]).pooler_output
        expected = normalize(parts.visual_projection(pooled), dim=-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


def test_text_features_do_not_depend_on_the_other_prompts(clip: Path) -> None:
    model = Clip(str(clip), CPU)
    together = model.text(["a cat", "a dog in the snow with far too many words for it"])
    torch.testing.assert_close(together[:1], model.text(["a cat"]))
    assert together.shape == (2, 8)


def test_dino_is_the_class_token_of_the_last_layer(dino: Path) -> None:
    pictures = noise(2)
    pixels = ViTImageProcessorPil.from_pretrained(dino)(pictures, return_tensors="pt")
    model = ViTModel.from_pretrained(dino, add_pooling_layer=False)
    with torch.no_grad():
        expected = normalize(model(pixels["pixel_values"]).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(ImageFeatures(str(dino), "dino", CPU)(pictures), expected)


def test_dinov2_is_taken_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    Dinov2Model(Dinov2Config(**config)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert ImageFeatures(str(tmp_path), "dino", CPU)(noise(2)).shape == (2, 16)


def test_what_is_no_such_model_is_refused(dino: Path, tmp_path: Path) -> None:
    with pytest.raises(SnellaBaseError, match=r"--clip .*: expected a CLIP model.*got ViTModel"):
        ImageFeatures(str(dino), "clip", CPU)
    with pytest.raises(SnellaBaseError, match=r"--dino .*nothing: cannot be loaded"):
        ImageFeatures(str(tmp_path / "nothing"), "dino", CPU)


def test_cosines_are_averaged_as_the_protocol_says() -> None:
    pictures, photos = torch.eye(3)[:2], torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8]])
    assert likeness(pictures, photos) == pytest.approx((1 + 0 + 0 + 0.6) / 4)
    assert obedience(pictures, photos) == pytest.approx((1 + 0.6) / 2)


def test_diversity_is_of_pairs_of_one_prompt() -> None:
    values = torch.tensor([[0.0], [3.0], [100.0], [101.0], [5000.0]])
    groups = [0, 0, 1, 1, 2]
    assert diversity(values, groups, root_mean_square) == pytest.approx((3 + 1) / 2)
    equal = torch.eye(2)[[0, 0, 1, 1]]
    assert diversity(equal, [0, 0, 1, 1], cosine_distance) == 0
    assert diversity(equal, [0, 1, 0, 1], cosine_distance) == 1
    with pytest.raises(ValueError, match="two pictures of a prompt"):
        diversity(values, [0, 1, 2, 3, 4], root_mean_square)


def test_scores_are_added_to_runs_that_are_there(
    tiny_base: Path, clip: Path, dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snell_diffusion.evaluation import personalization, pictures

    plan = write_plan(tmp_path, tiny_base, methods={"lora": {"method": "lora"}})
    assert main(command(plan)) == 0
    (before,) = read_records(tmp_path / "out" / "records")
    assert set(before.scores) == {"diversity"}

    monkeypatch.setattr(personalization, "run", None)
    monkeypatch.setattr(pictures, "draw", None)
    assert main(command(plan, "--clip", str(clip), "--dino", str(dino))) == 0
    (after,) = read_records(tmp_path / "out" / "records")
    assert set(after.scores) == {"clip_i", "clip_t", "dino", "diversity"}
    assert after.scores["diversity"]["space"] == str(dino)
    for name in ("clip_i", "clip_t", "dino"):
        assert -1 <= after.scores[name]["value"] <= 1
    (base,) = read_records(tmp_path / "out" / "base")
    assert set(base.scores) == set(after.scores)

    assert main(command(plan)) == 0
    assert read_records(tmp_path / "out" / "records") == [after]
