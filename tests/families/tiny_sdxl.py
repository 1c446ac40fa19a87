"""A tiny Stable Diffusion XL."""

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from snell_diffusion.diffusion.families import Conditions
from tests import tiny_models
from tests.families import components
from tests.families.tiny import Tiny


def save(folder: Path) -> None:
    pipe = StableDiffusionXLPipeline(
        vae=components.vae(),
        text_encoder=components.clip(0),
        text_encoder_2=components.clip(1, projection=True),
        tokenizer=components.clip_tokenizer(),
        tokenizer_2=components.clip_tokenizer(),
        unet=tiny_models.sd15_unet(
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    text, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    # The pipeline takes the first CLIP's states before its last layer.
    idle=("text_encoder.encoder.layers.1.",),
)
