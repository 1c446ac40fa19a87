"""Image files and arrays -> RGB pictures; what is wrong with a file is said in its own words."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.pixels import MAX_PIXELS, open_picture, upright_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
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
            return upright_rgb(image, behind="black")
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
        image = open_picture(path, FORMATS)
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
