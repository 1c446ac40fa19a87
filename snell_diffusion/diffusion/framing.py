"""How a photo fills a training picture: shape, scale, crop, mirroring; and what SDXL is told.

Shapes and sizes are (height, width) in pixels. A photo is scaled until it covers the shape, then
cut to it; `geometry` describes the very cut that `fit` makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.errors import SnellaConfigError

Size = tuple[int, int]
CENTRE = (0.5, 0.5)
_LARGEST_STEP = 64


@dataclass(frozen=True)
class View:
    """How a photo is shown.

    Attributes:
        crop: Where the cut sits along x and y, 0 (left, top) to 1; 0.5 is the centre.
        flip: Whether it is mirrored, left and right.
    """

    crop: tuple[float, float] = CENTRE
    flip: bool = False


@dataclass(frozen=True)
class Cut:
    """Where a training picture lies in its photo: the photo scaled to `scaled`, cut at a corner."""

    scaled: Size
    top: int
    left: int


def enlargement(size: Size, shape: Size) -> float:
    """The factor by which a photo of `size` is scaled to cover `shape`; above 1 it is blown up."""
    return max(wanted / side for wanted, side in zip(shape, size, strict=True))


def cut(size: Size, shape: Size, crop: tuple[float, float]) -> Cut:
    """The cut of `shape` out of a photo of `size`."""
    scale = enlargement(size, shape)
    height, width = (
        max(wanted, round(side * scale)) for wanted, side in zip(shape, size, strict=True)
    )
    top, left = round((height - shape[0]) * crop[1]), round((width - shape[1]) * crop[0])
    return Cut((height, width), top, left)


def fit(image: Image.Image, shape: Size, view: View) -> Tensor:
    """Scale and cut a picture.

    Args:
        image: RGB or grey picture.
        shape: Height and width of the result.
        view: Where the cut is, and whether it is mirrored.

    Returns:
        Tensor [C, height, width], uint8; C is 3 for RGB, 1 for grey.
    """
    where = cut(image.size[::-1], shape, view.crop)
    image = image.resize(where.scaled[::-1], Image.Resampling.LANCZOS, reducing_gap=3.0)
    corner = (where.left, where.top, where.left + shape[1], where.top + shape[0])
    pixels = torch.from_numpy(np.atleast_3d(np.array(image.crop(corner)))).permute(2, 0, 1)
    return pixels.flip(-1) if view.flip else pixels.contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def geometry(size: Size, shape: Size, view: View) -> Tensor:
    """Conditions["geometry"] of one training picture, float32 [6]; see `families.base.Conditions`.

    The crop is counted in the picture as it is shown: in a mirrored one from the mirrored photo's
    left edge, which is the photo's right edge.
    """
    where = cut(size, shape, view.crop)
    left = where.scaled[1] - shape[1] - where.left if view.flip else where.left
    return torch.tensor([*size, where.top, left, *shape], dtype=torch.float32)


def shapes(config: TrainConfig, multiple: int) -> list[Size]:
    """The shapes that a run trains on: one square, or the buckets of `aspect_ratio_buckets`.

    Args:
        config: Resolution and buckets.
        multiple: What the sides must be multiples of, see `Family.multiple`.

    Raises:
        SnellaConfigError: A side of a given bucket is no multiple.
    """
    from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

    buckets = config.aspect_ratio_buckets
    if buckets is None:
        return [(config.resolution, config.resolution)]
    if buckets == "auto":
        step = config.bucket_step or min(_LARGEST_STEP, config.resolution // 8)
        step = max(multiple, step - step % multiple)
        found: list[Size] = generate_aspect_ratio_buckets(config.resolution, step)
        return found
    given: list[Size] = parse_buckets_string(buckets)
    odd = [f"{height},{width}" for height, width in given if height % multiple or width % multiple]
    if odd:
        raise SnellaConfigError(
            f"aspect_ratio_buckets: sides must be multiples of {multiple} pixels for this base, "
            f"got {'; '.join(odd)}"
        )
    return given


def nearest(size: Size, among: Sequence[Size]) -> Size:
    """The shape whose aspect ratio is nearest to that of a photo of `size`."""
    from diffusers.training_utils import find_nearest_bucket

    return among[find_nearest_bucket(*size, among)]
