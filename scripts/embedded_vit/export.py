"""Write the trained ViT as one transformers folder that AutoModelForImageClassification loads."""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTForImageClassification, ViTImageProcessorPil

from .training import vit_config


def assemble(weights: dict[str, Tensor]) -> ViTForImageClassification:
    """The classifier of objects, float32, from the averaged weights of `SceneNet`.

    The other questions' heads are left out: only the object head has a place in the class.
    """
    model = ViTForImageClassification(vit_config())
    trunk = {k: v for k, v in weights.items() if k.startswith("vit.")}
    head = {f"classifier.{k}": weights[f"heads.object.{k}"] for k in ("weight", "bias")}
    model.load_state_dict({**trunk, **head})
    return model.eval()


def export(model: ViTForImageClassification, folder: Path) -> float:
    """Save in float16 and swap the folder in at once; the card there is kept.

    Returns:
        Size of the safetensors file in MB (1e6 bytes).
    """
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    model.to(torch.float16).save_pretrained(fresh)
    model.to(torch.float32)
    config = fresh / "config.json"  # float16 files, float32 by default
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(fresh)
    if folder.exists():
        for card in folder.glob("*.md"):
            shutil.copy(card, fresh / card.name)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return (folder / "model.safetensors").stat().st_size / 1e6
