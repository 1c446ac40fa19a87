"""Transformers over one sequence of text and image tokens."""

import torch

from tests.registry.record import HEADS, ROPE, Draw, Inputs, TinyFamily


def lumina2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw.normal(1, 5, 24),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
    }


def z_image(draw: Draw) -> Inputs:
    return {
        "x": [draw.normal(4, 1, 8, 8)],
        "t": torch.tensor([0.5]),
        "cap_feats": [draw.normal(5, 24)],
    }


def omnigen(draw: Draw) -> Inputs:
    tokens = 5 + 1 + 16  # text, time, image
    return {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "input_ids": torch.arange(1, 6)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, tokens, tokens),
        "position_ids": torch.arange(tokens)[None],
    }


def krea2(draw: Draw) -> Inputs:
    positions = torch.zeros(5 + 16, 3)
    positions[5:, 1], positions[5:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": draw.normal(1, 16, 4),
        "encoder_hidden_states": draw.normal(1, 5, 2, 32),
        "timestep": torch.tensor([0.5]),
        "position_ids": positions,
    }


def ideogram4(draw: Draw) -> Inputs:
    text, image = 3, 2
    return {
        "hidden_states": draw.normal(1, 21, 4),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw.normal(1, 21, 24),
        "position_ids": torch.arange(21)[None, :, None].expand(1, 21, 3),
        "segment_ids": torch.zeros(1, 21, dtype=torch.long),
        "indicator": torch.tensor([[text] * 5 + [image] * 16]),
    }


def ernie(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "text_bth": draw.normal(1, 5, 24),
        "text_lens": torch.tensor([5]),
    }


FAMILIES = [
    TinyFamily(
        name="lumina2",
        title="Lumina-Image 2.0",
        model="Lumina2Transformer2DModel",
        config={
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": ROPE,
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 24,
        },
        inputs=lumina2,
        scale_kwarg="attention_kwargs",
        pipelines=("Lumina2Pipeline",),
        fuses_qkv=False,
        graph_break="its caption lengths are read in Python",
    ),
    TinyFamily(
        name="z_image",
        title="Z-Image",
        model="ZImageTransformer2DModel",
        config={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": list(ROPE),
            "axes_lens": [64, 16, 16],
        },
        inputs=z_image,
        scale_kwarg="joint_attention_kwargs",
        pipelines=("ZImagePipeline",),
        fuses_qkv=False,
    ),
    TinyFamily(
        name="omnigen",
        title="OmniGen",
        model="OmniGenTransformer2DModel",
        config={
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
        },
        inputs=omnigen,
        pipelines=("OmniGenPipeline",),
        shell="it needs torchvision",
        fuses_qkv=False,
        graph_break="its rotary embedding branches on positions",
    ),
    TinyFamily(
        name="krea2",
        title="Krea 2",
        model="Krea2Transformer2DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": ROPE,
        },
        inputs=krea2,
        scale_kwarg="attention_kwargs",
        pipelines=("Krea2Pipeline",),
    ),
    TinyFamily(
        name="ideogram4",
        title="Ideogram 4",
        model="Ideogram4Transformer2DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        inputs=ideogram4,
        scale_kwarg="attention_kwargs",
        pipelines=("Ideogram4Pipeline",),
    ),
    TinyFamily(
        name="ernie_image",
        title="ERNIE-Image",
        model="ErnieImageTransformer2DModel",
        config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 24,
            "rope_axes_dim": ROPE,
        },
        inputs=ernie,
        pipelines=("ErnieImagePipeline",),
        fuses_qkv=False,
    ),
]
