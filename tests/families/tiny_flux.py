"""A tiny FLUX.1 dev."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from snell_diffusion.diffusion.families import Conditions
from snell_diffusion.diffusion.families.flux import TRAINING_GUIDANCE
from tests.families import components
from tests.families.tiny import Tiny

SIDE = 16


def pipeline(guidance_embeds: bool = True, **scheduler: Any) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=components.WIDTH,
        pooled_projection_dim=components.WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    ).eval()
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=components.vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=components.clip(),
        tokenizer=components.clip_tokenizer(),
        text_encoder_2=components.t5(),
        tokenizer_2=components.t5_tokenizer(),
    )


def save(folder: Path) -> None:
    pipeline(use_dynamic_shifting=True).save_pretrained(folder)


def save_schnell(folder: Path) -> None:
    pipeline(guidance_embeds=False).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    text, pooled, _ = pipe.encode_prompt(prompts)
    return {"text": text, "pooled": pooled}


def unpack(pipe: Any, latents: Tensor, height: int) -> Tensor:
    return FluxPipeline._unpack_latents(latents, height, SIDE, pipe.vae_scale_factor)


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    side=SIDE,
    plain={"guidance_scale": TRAINING_GUIDANCE},
    unpack=unpack,
)
VARIANTS = {"schnell": replace(TINY, save=save_schnell)}
