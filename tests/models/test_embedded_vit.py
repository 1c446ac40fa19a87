"""The classifier in the package loads without a network, fits its size, and does what it says."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTForImageClassification

from snell_diffusion.models import SHIPPED_BASES, VISION_BASES, embedded_path, embedded_vit_path

LIMIT_MB = 8  # safetensors, 1e6 bytes
DOCS = Path(__file__).resolve().parents[2] / "docs" / "embedded_vit"


@pytest.fixture(scope="module")
def model() -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(
        embedded_vit_path(), local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def scores() -> dict:
    return json.loads((DOCS / "scores.json").read_text())


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, list[str]]:
    """The 80 scenes of the documentation, (80, 64, 64, 3) uint8, and the objects they show."""
    sheet = np.asarray(Image.open(DOCS / "scenes.png"))
    images = sheet.reshape(5, 64, 16, 64, 3).transpose(0, 2, 1, 3, 4).reshape(80, 64, 64, 3)
    return images, json.loads((DOCS / "scenes.json").read_text())


def test_names() -> None:
    assert embedded_path("embedded-vit") == embedded_vit_path()
    assert not SHIPPED_BASES.keys() & VISION_BASES.keys()
    with pytest.raises(ValueError, match="known: embedded, embedded-dit, embedded-vit"):
        embedded_path("embedded-vti")


def test_size_and_files() -> None:
    folder = embedded_vit_path()
    assert (folder / "model.safetensors").stat().st_size <= LIMIT_MB * 1e6
    assert sorted(p.name for p in folder.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    ]
    card = (folder / "README.md").read_text()
    for word in ("Noto Color Emoji", "not photographic", "Pictures seen", "Misses"):
        assert word in card


def test_shape(model: ViTForImageClassification) -> None:
    assert sum(p.numel() for p in model.parameters()) == 2_742_456
    assert model.dtype == torch.float32  # float16 file, float32 by default
    assert len(model.config.id2label) == 120
    assert model.config.id2label[0] == "cat"
    assert "_name_or_path" not in (embedded_vit_path() / "config.json").read_text()


def test_preprocessor(scenes: tuple[np.ndarray, list[str]]) -> None:
    processor = AutoImageProcessor.from_pretrained(embedded_vit_path(), local_files_only=True)
    made = processor(images=Image.fromarray(scenes[0][0]), return_tensors="pt")["pixel_values"]
    want = torch.from_numpy(scenes[0][:1]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(made, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_names_objects_in_combinations_it_never_saw(
    model: ViTForImageClassification, scenes: tuple[np.ndarray, list[str]], scores: dict
) -> None:
    """80 scenes; the share right must be near that of the 3000 scenes of the scores."""
    images, names = scenes
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).logits
    guessed = [model.config.id2label[k] for k in logits.argmax(1).tolist()]
    right = np.mean([a == b for a, b in zip(guessed, names, strict=True)])
    measured = scores["held_out_combinations"]["object"]
    assert right == scores["sheet"]["object"]
    assert abs(right - measured) < 3 * np.sqrt(measured * (1 - measured) / 80)
    assert right > 0.2  # chance is 1 in 120


def test_weights_are_those_that_were_scored(scores: dict) -> None:
    content = (embedded_vit_path() / "model.safetensors").read_bytes()
    assert sha256(content).hexdigest() == scores["model_sha256"]
