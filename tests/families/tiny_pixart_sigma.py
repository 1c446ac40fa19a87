"""A tiny PixArt-Sigma, whose transformer also predicts a variance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from snell_diffusion.diffusion.families import Conditions
from tests.families import components
from tests.families.tiny import Tiny


def transformer(**changes: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,  # the second half is the variance
        "num_layers": 2,
        "cross_attention_dim": 32,
        "caption_channels": components.WIDTH,
        "sample_size": 8,
    }
    return PixArtTransformer2DModel(**{**config, **changes}).eval()


def parts(**changes: Any) -> dict[str, Any]:
    return {
        "tokenizer": components.t5_tokenizer(300),
        "text_encoder": components.t5(),
        "vae": components.vae(),
        "transformer": transformer(**changes),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def save(folder: Path) -> None:
    PixArtSigmaPipeline(**parts()).save_pretrained(folder)


def save_alpha(folder: Path) -> None:
    """A transformer for latents of 128 x 128 is told sizes; their embeddings come in threes."""
    sizes = {"sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 24}
    PixArtAlphaPipeline(**parts(**sizes)).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    text, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"text": text, "mask": mask}


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    plain={"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False},
    guided={"guidance_scale": 3.0, "use_resolution_binning": False, "clean_caption": False},
)

VARIANTS = {"alpha": replace(TINY, save=save_alpha)}
