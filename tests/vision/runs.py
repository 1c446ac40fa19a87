"""Tiny classification runs: bases of random weights, pictures of three colours, configs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from snell_diffusion.vision.config import VisionConfig

SIDE = 16
CLASSES = ("blue", "green", "red")
COUNTS = {"train": 8, "val": 4, "test": 4}  # of each class
SMALL: dict[str, dict[str, Any]] = {
    name: {"rank": 4} for name in ("arc", "hra", "oft", "shira", "snella")
}
"""Settings of the methods whose defaults do not fit layers of 16 to 64 features."""
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": 8,
}
BASES: dict[str, tuple[type, Any]] = {
    "vit": (ViTForImageClassification, ViTConfig(**_VIT, num_labels=7)),
    "swin": (
        SwinForImageClassification,
        SwinConfig(
            image_size=SIDE,
            patch_size=2,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
    ),
    "convnext": (
        ConvNextForImageClassification,
        ConvNextConfig(
            image_size=SIDE,
            patch_size=2,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
            layer_scale_init_value=1.0,
        ),
    ),
}


def save_base(name: str, folder: Path) -> Path:
    """Write a tiny base of a family, with its preprocessor_config.json."""
    torch.manual_seed(0)
    kind, config = BASES[name]
    kind(config).save_pretrained(folder)
    shown = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": SIDE, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    return folder


def write_pictures(root: Path) -> Path:
    """Noise, each class brighter in one colour."""
    number = 0
    for split, count in COUNTS.items():
        for channel, name in zip((2, 1, 0), CLASSES, strict=True):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                draw = np.random.default_rng(number)
                values = draw.integers(0, 160, (SIDE, SIDE, 3))
                values[..., channel] += 90
                picture = Image.fromarray(values.astype(np.uint8))
                picture.save(root / split / name / f"{index}.png")
                number += 1
    return root


def config(base: str, pictures: Path, folder: Path | None, **changes: Any) -> VisionConfig:
    """A quiet run of 2 epochs of 3 steps; with a folder it is written to `folder`/run."""
    values: dict[str, Any] = {
        "base": base,
        "dataset": "image_folder",
        "data_dir": str(pictures),
        "output_dir": None if folder is None else str(folder / "run"),
        "num_train_epochs": 2,
        "train_batch_size": 8,
        "learning_rate": 1e-2,
        "quiet": True,
    }
    return VisionConfig(**{**values, **changes})
