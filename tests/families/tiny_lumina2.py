"""A tiny Lumina 2: its VAE covers eight pixels by one latent, as the pipeline takes for granted."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)

from snell_diffusion.diffusion.families import Conditions
from tests.families import gemma
from tests.families.components import WIDTH
from tests.families.tiny import Tiny


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=[4, 4, 4, 4],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def transformer() -> Lumina2Transformer2DModel:
    torch.manual_seed(0)
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 8, 8),
        cap_feat_dim=WIDTH,
    ).eval()


def save(folder: Path) -> None:
    tokenizer = gemma.tokenizer()
    Lumina2Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(),
        text_encoder=gemma.encoder(len(tokenizer), layers=3),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    text, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"text": text, "mask": mask}


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    side=64,
    idle=("text_encoder.layers.2.",),  # the pipeline takes the last layer's input
    reads_values=True,
)
