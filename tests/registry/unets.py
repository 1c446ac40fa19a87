"""Convolutional UNets with attention blocks."""

from typing import Any

import torch

from tests.registry.record import Draw, Inputs, TinyFamily

SIZES: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
    "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def plain(draw: Draw) -> Inputs:
    return {
        "sample": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw.normal(1, 5, 16),
    }


def sized(draw: Draw) -> Inputs:
    added = {"text_embeds": draw.normal(1, 16), "time_ids": torch.ones(1, 6)}
    return {**plain(draw), "added_cond_kwargs": added}


FAMILIES = [
    TinyFamily(
        name="unet_sd15",
        title="Stable Diffusion 1.x, 2.x",
        model="UNet2DConditionModel",
        config={**SIZES, "attention_head_dim": 4},
        inputs=plain,
        scale_kwarg="cross_attention_kwargs",
        component="unet",
        pipelines=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
        ),
    ),
    TinyFamily(
        name="unet_sdxl",
        title="Stable Diffusion XL",
        model="UNet2DConditionModel",
        config={
            **SIZES,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
        inputs=sized,
        scale_kwarg="cross_attention_kwargs",
        component="unet",
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    ),
]
