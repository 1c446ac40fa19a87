"""Where the batches of a distillation come from: an image folder, or a pipeline's own calls.

Shapes: B batch; pixel values (B, 3, H, W).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from snell_diffusion.errors import SnellaFileError, SnellaValueError

__all__ = ["Call", "Pictures", "denoiser_of", "read_pictures", "recorded_calls", "replay"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Pictures:
    """A batch for a classifier.

    Attributes:
        pixels: (B, 3, H, W), as the model's preprocessor gives them.
        labels: (B,) int64, or None without labels.
    """

    pixels: Tensor
    labels: Tensor | None

    @staticmethod
    def of(model: nn.Module, batch: "Pictures") -> Tensor:
        """A classifier's logits for a batch, (B, classes)."""
        return model(pixel_values=batch.pixels).logits

    @staticmethod
    def task(logits: Tensor, batch: "Pictures") -> Tensor:
        """Cross entropy against the labels.

        Raises:
            SnellaValueError: There are none.
        """
        if batch.labels is None:
            raise SnellaValueError("these pictures have no labels: leave the task loss out")
        return F.cross_entropy(logits.float(), batch.labels)


def read_pictures(
    folder: Path, process: Callable[..., Mapping[str, Tensor]], label2id: Mapping[str, int]
) -> tuple[Tensor, Tensor | None]:
    """Every picture below a folder, and labels if all lie in folders named as the model's classes.

    Args:
        folder: Pictures at any depth; the name of the folder a picture is in may be its class.
        process: The model's image processor.
        label2id: Of the model's config.

    Returns:
        Pixel values (N, 3, H, W) in the order of the paths, and labels (N,) or None.

    Raises:
        SnellaFileError: There is no picture, or one cannot be read.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SnellaFileError(
            f"{folder} must hold pictures ({', '.join(sorted(SUFFIXES))}), at any depth; found none"
        )
    pixels = []
    for path in paths:
        try:
            with Image.open(path) as image:
                made = process(images=image.convert("RGB"), return_tensors="pt")
        except (OSError, UnidentifiedImageError) as error:
            raise SnellaFileError(f"{path} cannot be read as a picture: {error}") from error
        pixels.append(made["pixel_values"][0])
    names = [path.parent.name for path in paths]
    labelled = all(name in label2id for name in names)
    labels = torch.tensor([int(label2id[name]) for name in names]) if labelled else None
    return torch.stack(pixels), labels


@dataclass(frozen=True)
class Call:
    """One call of a denoiser by its pipeline: positional and named arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def replay(model: nn.Module, call: Call) -> Tensor:
    """The denoiser's prediction for a recorded call."""
    return model(*call.args, **{**call.kwargs, "return_dict": False})[0]


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of a pipeline's denoiser.

    Raises:
        SnellaValueError: It has neither a unet nor a transformer.
    """
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise SnellaValueError(
        f"{type(pipe).__name__} has no {' or '.join(DENOISERS)} to compress; it has "
        f"{', '.join(pipe.components)}"
    )


def recorded_calls(
    pipe: Any,
    prompts: Sequence[str],
    batch: int,
    seed: int,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> list[list[Call]]:
    """What the denoiser is given while the pipeline draws each prompt once.

    Inputs of every step of sampling, with the guidance's empty prompts, so whatever the model is
    called with in use; nothing is decoded.

    Args:
        pipe: A text-to-image pipeline.
        prompts: One per picture.
        batch: Pictures drawn at once; every call holds as many (twice as many with guidance).
        seed: Of the pictures.
        say: Takes a line of progress.
        options: Of the pipeline's call: num_inference_steps, guidance_scale, height, ...

    Returns:
        The calls of each batch of prompts, in the order of the steps.
    """
    if not prompts:
        raise SnellaValueError("to record calls, at least one prompt is needed, got none")
    drawn: list[list[Call]] = []
    _, denoiser = denoiser_of(pipe)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        drawn[-1].append(Call(_detached(args), _detached(kwargs)))

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for start in range(0, len(prompts), batch):
            drawn.append([])
            part = list(prompts[start : start + batch])
            generator = torch.Generator().manual_seed(seed + start)
            pipe(part, generator=generator, output_type="latent", **options)
            if say is not None:
                say(f"drew {start + len(part)} of {len(prompts)} prompts")
    finally:
        handle.remove()
    return drawn


def _detached(value: Any) -> Any:
    """The same with every tensor detached and copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(item) for item in value)
    return value
