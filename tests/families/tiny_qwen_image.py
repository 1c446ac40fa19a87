"""A tiny Qwen-Image; its tokenizer gives the template's start 34 tokens, as the real one."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from snell_diffusion.diffusion.families import Conditions
from tests.families import components
from tests.families.tiny import Tiny

_WORDS = (
    "detailing the color shape size texture quantity text spatial relationships of objects and "
    "background image by"
)


def tokenizer() -> Qwen2Tokenizer:
    made = components.qwen_tokenizer()
    made.add_tokens([" " + word for word in _WORDS.split()])
    made.add_tokens(["system", "Describe", "user", "assistant"])
    return made


def text_encoder(words: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": words,
        "initializer_range": 0.2,  # else attention is all but even, and nothing reaches queries
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": components.WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision["out_hidden_size"] = components.WIDTH
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def transformer() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=components.WIDTH,
        axes_dims_rope=(4, 2, 2),
    ).eval()


def vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.75, 0.5, 0.25, -1.0],
        latents_std=[2.0, 1.5, 0.5, 1.25],
    ).eval()


def save(folder: Path) -> None:
    words = tokenizer()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
        ),
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer(),
    ).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    text, mask = pipe.encode_prompt(prompts)
    behind = 512 - text.shape[1]
    return {"text": pad(text, (0, 0, 0, behind)), "mask": pad(mask.bool(), (0, behind))}


def unpack(pipe: Any, tokens: Tensor, height: int) -> Tensor:
    return pipe._unpack_latents(tokens, height, TINY.side, pipe.vae_scale_factor).squeeze(2)


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    plain={"true_cfg_scale": 1.0},
    guided={"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
    unpack=unpack,
    film=True,
    # Nothing follows on the text of the last block.
    idle=("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"),
    reads_values=True,
)
