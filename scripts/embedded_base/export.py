"""Write the trained parts as one diffusers folder that StableDiffusionPipeline loads."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from .text_to_image import build_scheduler, build_text_encoder, build_unet


def assemble(
    vae: AutoencoderKL, weights: dict[str, Tensor], tokenizer_folder: Path
) -> StableDiffusionPipeline:
    """A pipeline in float32 from averaged weights keyed 'unet.*' and 'text_encoder.*'."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    parts = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    for name, module in parts.items():
        prefix = f"{name}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        module.load_state_dict(own)
        module.eval()
    return StableDiffusionPipeline(
        vae=vae.eval(),
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


def export(pipeline: StableDiffusionPipeline, folder: Path) -> float:
    """Save in float16 and swap the folder in at once; files of other kinds there are kept.

    Returns:
        Size of the safetensors files in MB (1e6 bytes).
    """
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(fresh, safe_serialization=True)
    pipeline.to(dtype=torch.float32)
    # transformers loads in the dtype its config names: without this, a plain from_pretrained
    # would mix a float16 text encoder with a float32 UNet
    config = fresh / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    if folder.exists():
        for card in folder.glob("*.md"):
            shutil.copy(card, fresh / card.name)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e6
