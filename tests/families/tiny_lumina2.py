"""A tiny random Lumina 2 base: pictures of 64 pixels are latents of 8 x 8."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)

from tests.families import vocabularies
from tests.families.tiny_sana import text_encoder


def vae() -> AutoencoderKL:
    """Eight pixels per latent, scaled and shifted, as in FLUX."""
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
        mid_block_add_attention=False,
    ).eval()


def pipeline(seed: int = 0) -> Lumina2Pipeline:
    torch.manual_seed(seed)
    tokenizer = vocabularies.gemma([" <Prompt Start> "])
    transformer = Lumina2Transformer2DModel(
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
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(),
        text_encoder=text_encoder(len(tokenizer), layers=3),
        tokenizer=tokenizer,
    )
