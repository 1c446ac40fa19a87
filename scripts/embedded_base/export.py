"""Write the trained parts as one diffusers folder that its stock pipeline loads."""

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from snell_diffusion.diffusion.export import hide_paths

from .flow import build_flow_scheduler, build_transformer, with_projection
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


def assemble_dit(base: Path, weights: dict[str, Tensor]) -> StableDiffusion3Pipeline:
    """A pipeline in float32 from weights keyed 'transformer.*' and the base's other parts.

    Args:
        base: The exported embedded base, whose text encoder serves as both that SD3 has.
        weights: The averaged weights.
    """
    transformer = build_transformer()
    transformer.load_state_dict({k.removeprefix("transformer."): v for k, v in weights.items()})
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.register_to_config(shift_factor=0.0)  # the SD3 pipeline adds it and takes no None
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoder = with_projection(CLIPTextModel.from_pretrained(base / "text_encoder"))
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=build_flow_scheduler(),
        vae=vae.eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def export(pipeline: DiffusionPipeline, folder: Path) -> float:
    """Save in float16 and swap the folder in at once; files of other kinds there are kept.

    Returns:
        Size of the safetensors files in MB (1e6 bytes).
    """
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(fresh, safe_serialization=True)
    pipeline.to(dtype=torch.float32)
    hide_paths(fresh)
    # transformers loads in the dtype its config names: without this, a plain from_pretrained
    # would mix a float16 text encoder with a float32 UNet
    for config in fresh.glob("text_encoder*/config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    if folder.exists():
        for card in folder.glob("*.md"):
            shutil.copy(card, fresh / card.name)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e6
