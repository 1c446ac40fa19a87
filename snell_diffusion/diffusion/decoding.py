"""One picture file -> upright RGB without metadata, or the reason why not.

Only the PNG, JPEG and WebP decoders can be reached. Kind, size and shape are checked before any
pixel is decoded, so a file that unpacks to gigabytes costs nothing.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from snell_diffusion.training.pixels import MAX_PIXELS, open_picture, upright_rgb

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_FILE_BYTES = 256 * 2**20
MIN_SIDE = 16
MAX_ASPECT = 10  # longer side over shorter; scaling a narrower strip up would fill the memory


class PhotoError(ValueError):
    """Why a picture is not taken, starting with a verb: "is empty"."""


def open_photo(path: Path) -> Image.Image:
    """Decode one photo to upright RGB: EXIF orientation applied, transparency on white.

    Raises:
        PhotoError: It is not a whole, still jpg, png or webp of bearable size and shape.
    """
    return read_photo(path)[0]


def read_photo(path: Path, behind: str = "white") -> tuple[Image.Image, str]:
    """A photo as `open_photo` gives it, and the SHA-256 of the file in hex.

    Args:
        path: Its file.
        behind: The colour that shows where it is transparent.

    Raises:
        PhotoError: See `open_photo`.
    """
    try:
        with _open_regular(path) as file:
            picture = _decode(file, behind)
            file.seek(0)
            return picture, hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise PhotoError("is missing, or a link that leads nowhere") from error
    except OSError as error:
        raise PhotoError(f"cannot be read ({error.strerror or error})") from error


def _open_regular(path: Path) -> BinaryIO:
    # Without waiting: a named pipe would make us wait for someone who writes to it.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_file(os.fstat(handle))
    except PhotoError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _check_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise PhotoError("is not a regular file")
    if found.st_size == 0:
        raise PhotoError("is empty")
    if found.st_size > MAX_FILE_BYTES:
        raise PhotoError(f"has {found.st_size >> 20} MiB, more than {MAX_FILE_BYTES >> 20}")


def _decode(file: BinaryIO, behind: str) -> Image.Image:
    try:
        with open_picture(file, FORMATS) as image:
            _check(image)
            picture = upright_rgb(image, behind)
    except PhotoError:
        raise
    except UnidentifiedImageError as error:
        raise PhotoError("is not a jpg, png or webp file, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise PhotoError(f"has more than {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # a decoder given hostile bytes may raise anything
        raise PhotoError(f"cannot be decoded ({error or type(error).__name__})") from error
    picture.info.clear()  # camera, place and time stay out of whatever is written
    return picture


def _check(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PhotoError(f"is {width}x{height}, more than {MAX_PIXELS // 10**6} million pixels")
    if min(image.size) < MIN_SIDE:
        raise PhotoError(f"is {width}x{height}, below {MIN_SIDE} pixels on a side")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise PhotoError(
            f"is {width}x{height}, more than {MAX_ASPECT} times as long as wide: crop it"
        )
    # Photos of some cameras are JPEGs with a preview as second picture; those are no animations.
    frames = getattr(image, "n_frames", 1)
    if image.format in ("PNG", "WEBP") and frames > 1:
        raise PhotoError(f"is animated ({frames} frames): save one of them as a picture")
