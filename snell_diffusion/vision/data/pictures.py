"""Image files and arrays -> RGB pictures; what is wrong with a file is said in its own words."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from snell_diffusion.errors import SnellaConfigError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 50_000_000
_ENDS = 4096  # bytes at each end of a file that tell it from others of its size


class PictureError(ValueError):
    """Why a file is not taken, starting with a verb: "is empty"."""


class Pictures(Protocol):
    """A list of RGB pictures that is read when it is asked."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Image.Image:
        """One of them, RGB; SnellaConfigError where its file cannot be read."""

    def identity(self, index: int) -> str:
        """A text that equals that of another picture where both are the same file."""


def read_picture(path: Path) -> Image.Image:
    """Decode one file to upright RGB: EXIF orientation applied, transparency on black.

    Raises:
        PictureError: It is no picture, damaged, or has more than 50 million pixels.
    """
    with _opened(path) as image:
        try:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
        except Exception as error:  # a decoder given damaged bytes may raise anything
            raise PictureError(
                f"cannot be decoded ({error or type(error).__name__}); fetch it anew"
            ) from error


def check_picture(path: Path, how: str) -> None:
    """Look at a file as closely as `check_images` says.

    Raises:
        PictureError: See `read_picture`.
    """
    if not path.is_file():
        raise PictureError("is missing")
    if how == "headers":
        _opened(path).close()
    elif how == "pixels":
        read_picture(path)


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # The size is checked below, with a message of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise PictureError("is missing") from error
    except UnidentifiedImageError as error:
        reason = "is empty" if path.stat().st_size == 0 else "is no picture, whatever its name says"
        raise PictureError(reason) from error
    except OSError as error:
        raise PictureError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # header fields out of range, bombs
        raise PictureError(f"cannot be read ({error or type(error).__name__})") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        image.close()
        raise PictureError(f"is {size}, more than {MAX_PIXELS // 10**6} million pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return image.convert("RGB")


@dataclass(frozen=True)
class Files:
    """Pictures in files."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            return read_picture(self.paths[index])
        except PictureError as error:
            raise SnellaConfigError(f"image '{self.paths[index]}' {error}") from error

    def identity(self, index: int) -> str:
        path = self.paths[index]
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            ends = hashlib.sha256(head + file.read()).hexdigest()
        return f"{size} {ends}"


@dataclass(frozen=True)
class Arrays:
    """Pictures in memory, uint8 [H, W] or [H, W, 3] each."""

    values: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.values[index]).convert("RGB")

    def identity(self, index: int) -> str:
        value = self.values[index]
        return f"{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"


@dataclass(frozen=True)
class Chosen:
    """Some of other pictures."""

    among: Pictures
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image:
        return self.among[self.indices[index]]

    def identity(self, index: int) -> str:
        return self.among.identity(self.indices[index])
