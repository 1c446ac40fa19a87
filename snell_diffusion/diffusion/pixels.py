"""Photos and masks read again during a run: decoded, checked to be the same bytes, fitted."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.decoding import PhotoError, read_photo
from snell_diffusion.diffusion.framing import Size, View, fit
from snell_diffusion.diffusion.masks import Mask, read_mask
from snell_diffusion.errors import SnellaConfigError


def read_pixels(photo: Photo, shape: Size, view: View) -> Tensor:
    """Decode a photo and fit it into a shape, uint8 [3, H, W].

    Raises:
        SnellaConfigError: It is no longer what it was when the run began.
    """
    return _read("photo", photo, read_photo, shape, view)


def read_mask_pixels(photo: Photo, shape: Size, view: View) -> Tensor:
    """Decode a photo's mask and fit it as the photo, uint8 [1, H, W]; all white without one.

    Raises:
        SnellaConfigError: It is no longer what it was when the run began.
    """
    if photo.mask is None:
        return torch.full((1, *shape), 255, dtype=torch.uint8)
    return _read("mask", photo.mask, read_mask, shape, view)


def _read(
    kind: str,
    file: Photo | Mask,
    decode: Callable[[Path], tuple[Image.Image, str]],
    shape: Size,
    view: View,
) -> Tensor:
    try:
        picture, digest = decode(file.path)
        if digest != file.digest:
            raise PhotoError("holds other bytes than before")
        return fit(picture, shape, view)
    except PhotoError as error:
        raise SnellaConfigError(
            f"{kind} '{file.path}' {error}; it was fine when the run began: put it back"
        ) from error
