"""What the contract tests need to know of a family: its tiny pipeline, how the stock one is used.

Every family has a file `tiny_<name>.py` beside this one with a record `TINY = Tiny(...)`. Other
pipelines that it covers may stand there as `VARIANTS = {"variant": Tiny(...)}`; they are compared
with the stock pipeline, too, but not trained.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from snell_diffusion.diffusion.families import Conditions


def as_they_are(pipe: Any, latents: Tensor, height: int) -> Tensor:
    """Latents of pipelines that do not pack."""
    return latents


@dataclass(frozen=True)
class Tiny:
    """A family's tiny random pipeline.

    Attributes:
        save: (folder) -> None; writes a complete stock pipeline, seeded, a few hundred KB, with
            tokenizers, that `DiffusionPipeline.from_pretrained(folder)` loads offline.
        stock_text: (pipeline, prompts) -> what the stock pipeline's own encoding gives, under
            the names that the family's `encode_text` uses.
        options: What `DiffusionPipeline.from_pretrained` has to be given beside the folder.
        side: Side of training and sample pictures in pixels; a multiple of the family's `multiple`.
        plain: Arguments of a stock call without classifier-free guidance, under which the denoiser
            is asked exactly as in training.
        guided: Arguments of a stock call at guidance 3, as `sample` makes it for `guidance=3`.
        unpack: (pipeline, latents between two steps of the stock pipeline, height in pixels) ->
            [B, C, h, w] as the family's `denoise` takes them; the width is `side`.
        trains_text: Whether the contract tests train the text encoders too.
        idle: Parts of names of adapters that no gradient reaches, because the stock pipeline does
            not use what their layer gives.
        film: Whether its VAE takes films, of which a picture is one frame.
        reads_values: Whether its denoiser's way depends on the values of masks.
        atol: How exactly the stock scheduler follows the straight or curved path to the data.
    """

    save: Callable[[Path], None]
    stock_text: Callable[[Any, list[str]], Conditions]
    options: dict[str, Any] = field(default_factory=dict)
    side: int = 16
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    unpack: Callable[[Any, Tensor, int], Tensor] = as_they_are
    trains_text: bool = True
    idle: tuple[str, ...] = ()
    atol: float = 1e-4
    film: bool = False
    reads_values: bool = False


def tiny(name: str) -> Tiny:
    """The record of a family; fails where a family has none."""
    return records(name)[name]


def records(name: str) -> dict[str, Tiny]:
    """The family's record under its name, and those of its variants as "name-variant"."""
    module = importlib.import_module(f"tests.families.tiny_{name}")
    variants: dict[str, Tiny] = getattr(module, "VARIANTS", {})
    return {name: module.TINY, **{f"{name}-{key}": made for key, made in variants.items()}}
