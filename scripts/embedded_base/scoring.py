"""Scores and the class grid of an exported model, the same for every one that ships."""

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .data import EARLY_CLASSES
from .probe import Probe, accuracy, accuracy_by_class, generate, held_out_prompts
from .report import class_grid, draw_grid

GUIDANCE, SAMPLING_STEPS = 3.0, 20


def prompt_scores(
    pipeline: DiffusionPipeline, probe: Probe, prompts: int, seed: int, **options: Any
) -> dict[str, Any]:
    """Shares of right answers on held-out prompts, in [0, 1], and what sampling cost.

    Args:
        options: Of the pipeline's call.
    """
    whats = held_out_prompts(prompts, seed)
    started = time.process_time()
    x = generate(pipeline, whats, seed, GUIDANCE, SAMPLING_STEPS, **options)
    per_picture = (time.process_time() - started) / len(whats)
    early = [w.noun in EARLY_CLASSES for w in whats]
    return {
        "held_out_prompts": accuracy(probe, x, whats) | {"pictures": len(whats)},
        "held_out_prompts_first_20_classes": accuracy(
            probe, x[torch.tensor(early)], [w for w in whats if w.noun in EARLY_CLASSES]
        ),
        "object_by_class": accuracy_by_class(probe, x, whats),
        "sampling": {
            "guidance_scale": GUIDANCE,
            "steps": SAMPLING_STEPS,
            **options,
            "process_s_per_picture": round(per_picture, 3),
        },
    }


def draw_classes(pipeline: DiffusionPipeline, seed: int, path: Path) -> None:
    """The labelled grid of every class."""
    grid = class_grid()
    draw_grid(generate(pipeline, grid, seed + 1, GUIDANCE, SAMPLING_STEPS), grid, path)
