"""Files of pictures -> upright RGB. Which files are taken, every trainer says itself."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageColor, ImageOps

MAX_PIXELS = 50_000_000
"""Width times height above which a trainer refuses a picture, before it decodes any pixel."""


def open_picture(file: Path | BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Read the header of a picture, with no other decoders than those of `formats`.

    PIL's warning about large pictures is left out: callers compare with MAX_PIXELS.

    Raises:
        OSError: It cannot be read, or is of another format (PIL's UnidentifiedImageError).
        Exception: A decoder given damaged bytes may raise anything.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=formats)


def upright_rgb(image: Image.Image, behind: str) -> Image.Image:
    """Decode every pixel: EXIF orientation applied, 16-bit grey scaled, transparency filled.

    Args:
        image: As `open_picture` gives it; changed in place.
        behind: The colour that shows where it is transparent.

    Raises:
        Exception: A decoder given damaged bytes may raise anything.
    """
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        return _deep_grey(image, behind)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, behind), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image, behind: str) -> Image.Image:
    """16-bit grey to RGB; PIL's own conversion to 8 bits clips instead of scaling."""
    values = np.asarray(image, np.uint32)
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = ImageColor.getcolor(behind, "L")
    return Image.fromarray(grey).convert("RGB")
