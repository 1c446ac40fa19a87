"""A tiny random Qwen-Image base: pictures of 32 pixels are latents of 16 x 16."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.families import vocabularies

# With these the tiny tokenizer, like the real one, gives the template's start 34 tokens.
_WORDS = (
    "system Describe| the| image| by| detailing| color| shape| size| texture| quantity| text|"
    " spatial| relationships| of| objects| and| background|user|assistant"
)


def text_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": 32})
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def pipeline(seed: int = 0) -> QwenImagePipeline:
    torch.manual_seed(seed)
    tokenizer = vocabularies.qwen(["system", *_WORDS.split(" ", 1)[1].split("|")])
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 2, 2),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.75, 0.5, 0.25, -1.0],
        latents_std=[2.0, 1.5, 0.5, 1.25],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
        ),
        vae=vae.eval(),
        text_encoder=text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
