"""Video transformers; a picture is a video of one frame."""

import torch

from tests.registry.record import HEADS, Draw, Inputs, TinyFamily


def clip(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 4, 1, 8, 8),
        "encoder_hidden_states": draw.normal(1, 5, 24),
        "timestep": torch.tensor([500]),
    }


def ltx(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(1, 16, 4),
        "encoder_hidden_states": draw.normal(1, 5, 24),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 5),
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }


def hunyuan_video(draw: Draw) -> Inputs:
    return {
        **clip(draw),
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": draw.normal(1, 24),
        "guidance": torch.tensor([6.0]),
    }


def mochi(draw: Draw) -> Inputs:
    return {**clip(draw), "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)}


def cogvideox(draw: Draw) -> Inputs:
    return {**clip(draw), "hidden_states": draw.normal(1, 1, 4, 8, 8)}


FAMILIES = [
    TinyFamily(
        name="wan",
        title="Wan 2.x",
        model="WanTransformer3DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 24,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 16,
        },
        inputs=clip,
        scale_kwarg="attention_kwargs",
        pipelines=("WanPipeline",),
    ),
    TinyFamily(
        name="ltx",
        title="LTX-Video",
        model="LTXVideoTransformer3DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
        inputs=ltx,
        scale_kwarg="attention_kwargs",
        pipelines=("LTXPipeline",),
    ),
    TinyFamily(
        name="hunyuan_video",
        title="HunyuanVideo",
        model="HunyuanVideoTransformer3DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "pooled_projection_dim": 24,
            "rope_axes_dim": (4, 4, 8),
        },
        inputs=hunyuan_video,
        scale_kwarg="attention_kwargs",
        pipelines=("HunyuanVideoPipeline",),
    ),
    TinyFamily(
        name="mochi",
        title="Mochi",
        model="MochiTransformer3DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
        },
        inputs=mochi,
        scale_kwarg="attention_kwargs",
        pipelines=("MochiPipeline",),
        fuses_qkv=False,
    ),
    TinyFamily(
        name="cogvideox",
        title="CogVideoX",
        model="CogVideoXTransformer3DModel",
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 1,
            "max_text_seq_length": 5,
        },
        inputs=cogvideox,
        scale_kwarg="attention_kwargs",
        pipelines=("CogVideoXPipeline",),
    ),
]
