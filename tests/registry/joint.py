"""Transformers with a text stream beside the image stream: MMDiT and its relatives."""

from typing import Any

import torch

from tests.registry.record import HEADS, ROPE, Draw, Inputs, TinyFamily


def latents(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 5, 24),
        "timestep": torch.tensor([500.0]),
    }


def sd3(draw: Draw) -> Inputs:
    return {**latents(draw), "pooled_projections": draw.normal(1, 24)}


def packed(draw: Draw) -> Inputs:
    """FLUX's form: 16 image tokens at their row and column, 5 text tokens at 0."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": draw.normal(1, 16, 4),
        "encoder_hidden_states": draw.normal(1, 5, 24),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([0 * rows, rows, columns], -1).reshape(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def flux(draw: Draw) -> Inputs:
    return {**packed(draw), "pooled_projections": draw.normal(1, 24)}


def flux2(draw: Draw) -> Inputs:
    inputs = packed(draw)
    for name in ("img_ids", "txt_ids"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1))
    return {**inputs, "guidance": torch.tensor([3.5])}


def qwen(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 16, 16),
        "encoder_hidden_states": draw.normal(1, 5, 24),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }


def cogview(draw: Draw) -> Inputs:
    size = torch.tensor([[64.0, 64.0]])
    return {
        **latents(draw),
        "timestep": torch.tensor([500]),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(1, 2),
    }


def hunyuan_image(draw: Draw) -> Inputs:
    return {**latents(draw), "encoder_attention_mask": torch.ones(1, 5)}


def hidream(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timesteps": torch.tensor([500.0]),
        "encoder_hidden_states_t5": draw.normal(1, 5, 24),
        "encoder_hidden_states_llama3": draw.normal(2, 1, 5, 24),
        "pooled_embeds": draw.normal(1, 24),
    }


def fibo(draw: Draw) -> Inputs:
    return {**packed(draw), "text_encoder_layers": [draw.normal(1, 5, 16) for _ in range(2)]}


FLUX_SIZES: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 24,
    "axes_dims_rope": ROPE,
}

FAMILIES = [
    TinyFamily(
        name="sd3",
        title="Stable Diffusion 3, 3.5",
        model="SD3Transformer2DModel",
        config={
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 8,
        },
        inputs=sd3,
        scale_kwarg="joint_attention_kwargs",
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    ),
    TinyFamily(
        name="flux",
        title="FLUX.1",
        model="FluxTransformer2DModel",
        config={**FLUX_SIZES, "patch_size": 1, "pooled_projection_dim": 24},
        inputs=flux,
        scale_kwarg="joint_attention_kwargs",
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxFillPipeline"),
    ),
    TinyFamily(
        name="flux2",
        title="FLUX.2",
        model="Flux2Transformer2DModel",
        config={
            **FLUX_SIZES,
            "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 16,
            "mlp_ratio": 2.0,
        },
        inputs=flux2,
        scale_kwarg="joint_attention_kwargs",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    ),
    TinyFamily(
        name="chroma",
        title="Chroma",
        model="ChromaTransformer2DModel",
        config={
            **FLUX_SIZES,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        inputs=packed,
        scale_kwarg="joint_attention_kwargs",
        pipelines=("ChromaPipeline",),
    ),
    TinyFamily(
        name="bria",
        title="Bria 3.2",
        model="BriaTransformer2DModel",
        config={**FLUX_SIZES, "pooled_projection_dim": 24},
        inputs=packed,
        scale_kwarg="attention_kwargs",
        pipelines=("BriaPipeline",),
        shell="its constructor reads the VAE's config",
        fuses_qkv=False,
    ),
    TinyFamily(
        name="bria_fibo",
        title="Bria FIBO",
        model="BriaFiboTransformer2DModel",
        config={**FLUX_SIZES, "text_encoder_dim": 16},
        inputs=fibo,
        scale_kwarg="joint_attention_kwargs",
        pipelines=("BriaFiboPipeline",),
        fuses_qkv=False,
    ),
    TinyFamily(
        name="longcat",
        title="LongCat-Image",
        model="LongCatImageTransformer2DModel",
        config={**FLUX_SIZES, "pooled_projection_dim": 24},
        inputs=packed,
        pipelines=("LongCatImagePipeline",),
    ),
    TinyFamily(
        name="ovis_image",
        title="Ovis-Image",
        model="OvisImageTransformer2DModel",
        config={**FLUX_SIZES, "out_channels": 4},
        inputs=packed,
        scale_kwarg="joint_attention_kwargs",
        pipelines=("OvisImagePipeline",),
        fuses_qkv=False,
    ),
    TinyFamily(
        name="auraflow",
        title="AuraFlow",
        model="AuraFlowTransformer2DModel",
        config={
            **HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        inputs=latents,
        scale_kwarg="attention_kwargs",
        pipelines=("AuraFlowPipeline",),
    ),
    TinyFamily(
        name="qwen_image",
        title="Qwen-Image",
        model="QwenImageTransformer2DModel",
        config={
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": ROPE,
        },
        inputs=qwen,
        scale_kwarg="attention_kwargs",
        pipelines=("QwenImagePipeline", "QwenImageEditPipeline"),
    ),
    TinyFamily(
        name="cogview3",
        title="CogView 3 Plus",
        model="CogView3PlusTransformer2DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        inputs=cogview,
        pipelines=("CogView3PlusPipeline",),
    ),
    TinyFamily(
        name="cogview4",
        title="CogView 4",
        model="CogView4Transformer2DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        inputs=cogview,
        scale_kwarg="attention_kwargs",
        pipelines=("CogView4Pipeline",),
        fuses_qkv=False,
    ),
    TinyFamily(
        name="hunyuan_image",
        title="HunyuanImage 2.1",
        model="HunyuanImageTransformer2DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "rope_axes_dim": (8, 8),
        },
        inputs=hunyuan_image,
        scale_kwarg="attention_kwargs",
        pipelines=("HunyuanImagePipeline",),
    ),
    TinyFamily(
        name="hidream",
        title="HiDream-I1",
        model="HiDreamImageTransformer2DModel",
        config={
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [24, 24],
            "text_emb_dim": 24,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": ROPE,
            "max_resolution": (8, 8),
            "llama_layers": [0, 1],
        },
        inputs=hidream,
        scale_kwarg="attention_kwargs",
        pipelines=("HiDreamImagePipeline",),
        fuses_qkv=False,
        graph_break="its experts count tokens in Python",
    ),
]
