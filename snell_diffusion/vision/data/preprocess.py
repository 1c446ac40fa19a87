"""An RGB picture -> what a vision model reads: scaled, cut, perhaps mirrored, normalised.

The same steps as the usual torchvision ones, with Pillow and torch alone. Which part of an image a
random crop shows is a function of a generator that the caller makes from counters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.vision.data.settings import Data

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_TRIES = 10
_ASPECT = (3 / 4, 4 / 3)  # of a random crop, width over height
PROCESSOR_FILE = "preprocessor_config.json"


def read_processor(base: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """The values of a model's preprocessor_config.json, or None where it has none.

    Args:
        base: Folder or hub id of the model.
        revision: Branch, tag or commit of a hub model.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    if Path(base).is_dir() and not (Path(base) / PROCESSOR_FILE).is_file():
        return None
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(
            str(base), **({"revision": revision} if revision else {})
        )
    except OSError:
        return None
    return dict(values)


@dataclass(frozen=True)
class Preprocess:
    """How pictures are shown to one model.

    Attributes:
        size: Side of the square result in pixels.
        mean: Subtracted from red, green and blue, which are 0 to 1.
        std: What they are divided by then.
        resample: How pictures are scaled.
        transform: See `Data.transform`.
        crop_share: See `Data.crop_share`.
        crop_scale_min: See `Data.crop_scale_min`.
        flips: Whether half of the training pictures are mirrored.
        padding: Black border in pixels of the picture as it is stored.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Image.Resampling = Image.Resampling.BILINEAR
    transform: str = "resize"
    crop_share: float = 0.875
    crop_scale_min: float = 0.08
    flips: bool = False
    padding: int = 0

    @classmethod
    def of(cls, config: Data, processor: Mapping[str, Any] | None, image_size: int) -> "Preprocess":
        """What a config and a model's image processor say together; the config wins.

        Args:
            config: The run.
            processor: Values of preprocessor_config.json, see `read_processor`.
            image_size: Side in pixels that the model was trained at.

        Raises:
            SnellaConfigError: Neither says by what the colours are normalised.
        """
        values = processor or {}
        return cls(
            size=config.resolution or image_size,
            mean=_three("image_mean", config.image_mean, values, 0.0),
            std=_three("image_std", config.image_std, values, 1.0),
            resample=_RESAMPLING[config.interpolation]
            if config.interpolation
            else Image.Resampling(values.get("resample", Image.Resampling.BILINEAR)),
            transform=config.transform,
            crop_share=config.crop_share,
            crop_scale_min=config.crop_scale_min,
            flips=config.flips,
            padding=config.padding,
        )

    @property
    def varies(self) -> bool:
        """Whether a training picture looks different every time."""
        return self.flips or self.transform == "random_resized_crop"

    def eval(self, image: Image.Image) -> Tensor:
        """A picture for measuring or prediction: float32 [3, size, size]."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image, view: torch.Generator | None = None) -> Tensor:
        """Scale and cut a picture.

        Args:
            image: RGB picture.
            view: Draws the crop and the mirroring of a training picture; None for measuring.

        Returns:
            Tensor [3, size, size], uint8.
        """
        if self.padding:
            image = ImageOps.expand(image, self.padding, fill="black")
        box, mirrored = self._box(image.size), False
        if view is not None:
            if self.transform == "random_resized_crop":
                box = random_box(image.size, self.crop_scale_min, view)
            mirrored = self.flips and bool(torch.rand((), generator=view) < 0.5)
        scaled = image.resize((self.size, self.size), self.resample, box=box)
        values = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
        return values.flip(-1) if mirrored else values.contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] -> float32 of the same shape, (pixels / 255 - mean) / std."""
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std

    def _box(self, size: tuple[int, int]) -> Box:
        """What is shown of a picture of `size` (width, height) that is measured on."""
        width, height = size
        if self.transform == "resize":
            return 0, 0, width, height
        side = self.crop_share * min(size)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side


def random_box(size: tuple[int, int], smallest: float, view: torch.Generator) -> Box:
    """A random part of a picture: `smallest` to all of its area, aspect ratio 3/4 to 4/3.

    As in the Inception paper (arXiv:1409.4842): areas are drawn evenly, aspect ratios evenly in
    their logarithm; ten tries, then the largest centre crop of an allowed aspect ratio.

    Args:
        size: Width and height of the picture in pixels.
        smallest: Smallest share of its area, above 0 to 1.
        view: Where the random numbers come from; always the same count is drawn.
    """
    width, height = size
    low, high = (math.log(aspect) for aspect in _ASPECT)
    draws = torch.rand(_TRIES, 4, generator=view, dtype=torch.float64).tolist()
    for area, aspect, x, y in draws:
        pixels = width * height * (smallest + (1 - smallest) * area)
        ratio = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = round((width - w) * x), round((height - h) * y)
            return left, top, left + w, top + h
    w = min(width, round(height * _ASPECT[1]))
    h = min(height, round(width / _ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _three(
    name: str, given: list[float], values: Mapping[str, Any], unchanged: float
) -> tuple[float, float, float]:
    """Three numbers of the config, else of the image processor."""
    found = given or values.get(name)
    if not given and values.get("do_normalize") is False:
        found = [unchanged] * 3
    if not isinstance(found, (list, tuple)) or len(found) != 3:
        raise SnellaConfigError(
            f"{name} is neither in the config nor in the model's {PROCESSOR_FILE}: give three "
            f"numbers, for example [0.5, 0.5, 0.5] for a ViT trained on ImageNet-21k"
        )
    red, green, blue = map(float, found)
    return red, green, blue
