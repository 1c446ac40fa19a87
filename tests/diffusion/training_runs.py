"""Photos and configs of the tiny training runs that the tests make."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig

SIDE = 16  # pixels: latents of 8 x 8 in the tiny base
PROMPT, CLASS_PROMPT = "a sks cat", "a cat"


def write_photos(folder: Path, count: int = 4) -> Path:
    """Different noisy pictures, not square, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (24, 20 + index, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def config(base: Path, folder: Path, **changes: Any) -> TrainConfig:
    """A run of 4 steps on the tiny base in `folder`, with photos beside the run folder."""
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(write_photos(folder / "photos")),
        "instance_prompt": PROMPT,
        "num_validation_photos": 1,
        "validation_timesteps": 2,
        "resolution": SIDE,
        "output_dir": str(folder / "run"),
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "rank": 4,
        "target_modules": ["to_q", "to_v"],
        "num_inference_steps": 2,
    }
    return TrainConfig(**{**values, **changes})
