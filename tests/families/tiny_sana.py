"""A tiny random Sana base: pictures of 64 pixels are latents of 2 x 2, the smallest step is 32."""

import inspect

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model

from tests.families import vocabularies

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]


def text_encoder(vocabulary: int, layers: int = 2) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=512,
    )
    return Gemma2Model(config).eval()


def vae() -> AutoencoderDC:
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        decoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (), (), ()),
        decoder_qkv_multiscales=((), (), (), (), (), ()),
        scaling_factor=0.41407,
    ).eval()


def pipeline(seed: int = 0) -> SanaPipeline:
    torch.manual_seed(seed)
    tokenizer = vocabularies.gemma(INSTRUCTION.default)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        mlp_ratio=1.5,
        sample_size=2,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(len(tokenizer)),
        vae=vae(),
        transformer=transformer.eval(),
        # As the released bases have it; timesteps come from flow sigmas.
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
