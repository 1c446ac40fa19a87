"""A tiny Stable Diffusion 3 without T5: its place in the prompt holds zeros."""

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from snell_diffusion.diffusion.families import Conditions
from tests import tiny_models
from tests.families import components
from tests.families.tiny import Tiny


def pipeline(t5: bool) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=tiny_models.sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=components.vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=components.clip(0, projection=True),
        tokenizer=components.clip_tokenizer(),
        text_encoder_2=components.clip(1, projection=True),
        tokenizer_2=components.clip_tokenizer(),
        text_encoder_3=components.t5() if t5 else None,
        tokenizer_3=components.t5_tokenizer() if t5 else None,
    )


def save(folder: Path) -> None:
    pipeline(t5=False).save_pretrained(folder)


def save_with_t5(folder: Path) -> None:
    pipeline(t5=True).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    options={"text_encoder_3": None, "tokenizer_3": None},
    # The last block drops the text's answers, so nothing depends on its questions.
    idle=("transformer_blocks.1.attn.add_q_proj",),
)
VARIANTS = {"t5": Tiny(save=save_with_t5, stock_text=stock_text)}
