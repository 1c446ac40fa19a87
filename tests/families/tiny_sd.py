"""A tiny Stable Diffusion."""

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from snell_diffusion.diffusion.families import Conditions
from tests import tiny_models
from tests.families.tiny import Tiny


def save(folder: Path) -> None:
    pipe = tiny_models.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    pipe.save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    return {"text": pipe.encode_prompt(prompts, "cpu", 1, False)[0]}


TINY = Tiny(save=save, stock_text=stock_text)
