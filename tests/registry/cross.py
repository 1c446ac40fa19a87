"""Transformers that read the prompt by cross-attention, or take a class instead of a prompt."""

import torch

from tests.registry.record import HEADS, Draw, Inputs, TinyFamily


def latents(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "encoder_hidden_states": draw.normal(1, 5, 24),
        "timestep": torch.tensor([500]),
    }


def pixart(draw: Draw) -> Inputs:
    nothing = {"resolution": None, "aspect_ratio": None}
    return {**latents(draw), "added_cond_kwargs": nothing}


def dit(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([3]),
    }


def hunyuan_dit(draw: Draw) -> Inputs:
    angles = draw.normal(16, 16)
    return {
        **latents(draw),
        "timestep": torch.tensor([500.0]),
        "text_embedding_mask": torch.ones(1, 5),
        "encoder_hidden_states_t5": draw.normal(1, 6, 16),
        "text_embedding_mask_t5": torch.ones(1, 6),
        "image_meta_size": torch.full((1, 6), 64.0),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def lumina(draw: Draw) -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        **latents(draw),
        "timestep": torch.tensor([0.5]),
        "encoder_mask": torch.ones(1, 5),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
        "cross_attention_kwargs": {},
    }


def prx(draw: Draw) -> Inputs:
    return {**latents(draw), "timestep": torch.tensor([0.5])}


FAMILIES = [
    TinyFamily(
        name="pixart",
        title="PixArt-Alpha, PixArt-Sigma",
        model="PixArtTransformer2DModel",
        config={
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "caption_channels": 24,
            "cross_attention_dim": 32,
            "use_additional_conditions": False,
        },
        inputs=pixart,
        pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    ),
    TinyFamily(
        name="sana",
        title="Sana",
        model="SanaTransformer2DModel",
        config={
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
        inputs=latents,
        scale_kwarg="attention_kwargs",
        pipelines=("SanaPipeline", "SanaSprintPipeline"),
    ),
    TinyFamily(
        name="dit",
        title="DiT",
        model="DiTTransformer2DModel",
        config={
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "num_embeds_ada_norm": 10,
        },
        inputs=dit,
        pipelines=("DiTPipeline",),
        fuses_qkv=False,
    ),
    TinyFamily(
        name="hunyuan_dit",
        title="Hunyuan-DiT",
        model="HunyuanDiT2DModel",
        config={
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": 5,
            "text_len_t5": 6,
        },
        inputs=hunyuan_dit,
        pipelines=("HunyuanDiTPipeline",),
    ),
    TinyFamily(
        name="lumina_next",
        title="Lumina-Next",
        model="LuminaNextDiT2DModel",
        config={
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 24,
        },
        inputs=lumina,
        pipelines=("LuminaPipeline",),
        bypassed=("to_out.0",),
        fuses_qkv=False,
    ),
    TinyFamily(
        name="prx",
        title="PRX",
        model="PRXTransformer2DModel",
        config={
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        inputs=prx,
        fuses_qkv=False,
        pipelines=("PRXPipeline",),
    ),
]
