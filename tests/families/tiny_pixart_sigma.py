"""A tiny random PixArt-Sigma base: pictures of 32 pixels are latents of 16 x 16."""

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel

from tests import tiny_models
from tests.families import vocabularies


def pipeline(seed: int = 0) -> PixArtSigmaPipeline:
    torch.manual_seed(seed)
    tokenizer = vocabularies.t5()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # the second half is the learned variance
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
    )
    vae: AutoencoderKL = tiny_models.vae(seed)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(config).eval(),
        vae=vae,
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )
