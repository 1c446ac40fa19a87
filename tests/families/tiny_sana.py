"""A tiny Sana: one latent covers 32 pixels, as in the real one."""

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)

from snell_diffusion.diffusion.families import Conditions
from tests.families import gemma
from tests.families.components import WIDTH
from tests.families.tiny import Tiny

_CALL = inspect.signature(SanaPipeline.__call__).parameters
_INSTRUCTION = _CALL["complex_human_instruction"].default


def vae() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        decoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    ).eval()


def transformer(out_channels: int = 4) -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=out_channels,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        mlp_ratio=1.5,
        sample_size=2,
        timestep_scale=0.5,
    ).eval()


def save(folder: Path, out_channels: int = 4) -> None:
    tokenizer = gemma.tokenizer(_INSTRUCTION)
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma.encoder(len(tokenizer)),
        vae=vae(),
        transformer=transformer(out_channels),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    text, mask, _, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, complex_human_instruction=_INSTRUCTION
    )
    return {"text": text, "mask": mask}


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    side=64,
    plain={"guidance_scale": 1.0, "use_resolution_binning": False},
    guided={"guidance_scale": 3.0, "use_resolution_binning": False},
    atol=1e-2,  # this scheduler rounds timesteps to whole numbers, but not its noise levels
)

VARIANTS = {"variance": replace(TINY, save=partial(save, out_channels=8))}
