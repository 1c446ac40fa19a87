"""Masks beside photos: which part of a photo the loss counts.

A mask is a grey picture as large as its photo, white where the subject is: `name.mask.png` beside
`name.jpg`, or `masks/name.png`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.decoding import PhotoError, read_photo

FOLDER = "masks"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Mask:
    """One checked mask: its file and the SHA-256 of its bytes."""

    path: Path
    digest: str


def is_mask(path: Path) -> bool:
    """Whether a file is a mask by its name."""
    return path.suffix.lower() in SUFFIXES and (
        path.stem.endswith(".mask") or path.parent.name == FOLDER
    )


def photo_stem(mask: Path) -> Path:
    """The path of the photo that a mask belongs to, without suffix."""
    if mask.parent.name == FOLDER:
        return mask.parent.parent / mask.stem.removesuffix(".mask")
    return mask.with_name(mask.stem.removesuffix(".mask"))


def by_photo(masks: Sequence[Path]) -> dict[Path, list[Path]]:
    """Mask files by the path of their photo without suffix."""
    found: dict[Path, list[Path]] = {}
    for path in masks:
        found.setdefault(photo_stem(path), []).append(path)
    return found


def check_mask(paths: Sequence[Path], photo: Image.Image) -> Mask | None:
    """Read the mask of a photo; None without one.

    Raises:
        PhotoError: There are several, or it does not fit, or it is black.
    """
    if not paths:
        return None
    if len(paths) > 1:
        raise PhotoError(f"has {len(paths)} masks: {', '.join(path.name for path in paths)}")
    (path,) = paths
    try:
        picture, digest = read_mask(path)
    except PhotoError as error:
        raise PhotoError(f"has a mask {path.name} that {error}") from error
    if picture.size != photo.size:
        sizes = [f"{width}x{height}" for width, height in (photo.size, picture.size)]
        raise PhotoError(f"is {sizes[0]}, its mask {path.name} {sizes[1]}: make them equal")
    if picture.getextrema()[1] == 0:
        raise PhotoError(f"has a mask {path.name} that is black everywhere")
    return Mask(path, digest)


def read_mask(path: Path) -> tuple[Image.Image, str]:
    """A mask as an upright grey picture, and the SHA-256 of its file in hex.

    What is transparent in it is black: a subject that was cut out is left on nothing.

    Raises:
        PhotoError: See `read_photo`.
    """
    picture, digest = read_photo(path, behind="black")
    return picture.convert("L"), digest


def loss_weights(mask: Tensor, shape: tuple[int, int], unmasked_weight: float) -> Tensor:
    """Weight of every latent's squared error.

        w = u + (1 - u) m,  m the mean of the mask over the latent's pixels

    Args:
        mask: uint8 [1, H, W], 255 where the subject is.
        shape: Height and width of the latents.
        unmasked_weight: u, the weight of what is black, 0 to 1.

    Returns:
        Tensor [1, h, w], float32, u to 1.
    """
    share = F.adaptive_avg_pool2d(mask.float() / 255, shape)
    return unmasked_weight + (1 - unmasked_weight) * share
