"""A tiny FLUX.2 klein."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor

from snell_diffusion.diffusion.families import Conditions
from tests.families import components
from tests.families.tiny import Tiny

SIDE = 16
LAYERS = 28  # the pipeline reads the hidden states of layers 9, 18 and 27


def vae() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
    )
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made.eval()


def pipeline(is_distilled: bool = False) -> Flux2KleinPipeline:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * components.WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=components.qwen3(layers=LAYERS),
        tokenizer=components.qwen_tokenizer(),
        is_distilled=is_distilled,
    )


def save(folder: Path) -> None:
    pipeline().save_pretrained(folder)


def save_distilled(folder: Path) -> None:
    pipeline(is_distilled=True).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    return {"text": pipe.encode_prompt(prompts)[0]}


def unpack(pipe: Any, latents: Tensor, height: int) -> Tensor:
    rows, columns = (side // pipe.vae_scale_factor // 2 for side in (height, SIDE))
    return latents.transpose(1, 2).reshape(len(latents), -1, rows, columns)


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    side=SIDE,
    unpack=unpack,
    trains_text=False,
)
VARIANTS = {"distilled": replace(TINY, save=save_distilled)}
