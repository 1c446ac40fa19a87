"""Photos and configs of the tiny training runs that the tests make."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig

SIDE = 16  # pixels: latents of 8 x 8 in the tiny base
PROMPT, CLASS_PROMPT = "a sks cat", "a cat"
# What `config` takes for a run with everything on.
FULL: dict[str, Any] = {
    "class_prompt": CLASS_PROMPT,
    "with_prior_preservation": True,
    "num_class_images": 3,
    "class_batch_size": 1,
    "train_text_encoder": True,
    "ema_decay": 0.9,
    "snr_gamma": 5.0,
    "gradient_accumulation_steps": 2,
    "random_flip": True,
    "validation_steps": 2,
    "sample_steps": 2,
    "validation_prompt": PROMPT,
    "sample_prompts": ["a cat on grass"],
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 3,
    "dropout": 0.1,
    "init": "identity",  # so that the run starts at the base's own loss
    "sparsify": "mask",
}


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


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its path there."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def adapter(folder: Path) -> bytes:
    """The adapter file of a run folder."""
    return (folder / "pytorch_snella_weights.safetensors").read_bytes()
