"""Calls of stock pipelines, and what they give their scheduler."""

from typing import Any

import torch
from torch import Tensor

from tests.families.conftest import Case

PROMPTS = ["a sks cat", "a dog on a very long and winding road"]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def call(case: Case, pipe: Any, steps: int, **more: Any) -> Any:
    """The stock pipeline on PROMPTS."""
    side = case.tiny.side
    values = {"output_type": "latent", "height": side, "width": side, **more}
    # A list of its own, for some pipelines write their template into it.
    prompts = list(PROMPTS)
    return pipe(prompt=prompts, num_inference_steps=steps, generator=generators(), **values)


def stock_steps(
    case: Case, stock: Any, steps: int, **more: Any
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Output, timestep and sample that the pipeline gives its scheduler, without guidance."""
    seen, step = [], stock.scheduler.step

    def record(output: Tensor, t: Tensor, sample: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((output, t, sample))
        return step(output, t, sample, *rest, **named)

    stock.scheduler.step = record
    call(case, stock, steps, **{**case.tiny.plain, **more})
    return seen
