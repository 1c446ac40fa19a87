"""Uploaded photos: decoded once under limits, stored upright and without their metadata."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from snell_diffusion.diffusion.decoding import open_photo
from snell_diffusion.errors import SnellaValueError

MAX_PHOTOS = 30
MAX_SIDE = 1024  # pixels; stored photos are scaled down to this


def store_photos(uploads: Sequence[str | Path], folder: Path) -> list[Path]:
    """Check all uploads, then write them to `folder` as photo-00.png, photo-01.png, ...

    Args:
        uploads: Where the server stored them; the file names are used in messages only.
        folder: Made here.

    Returns:
        The stored photos: RGB, at most MAX_SIDE pixels a side.

    Raises:
        SnellaValueError: None given, more than MAX_PHOTOS, or any that is not a whole PNG, JPEG
            or WebP of bearable size; all bad ones are named and nothing is written.
    """
    if not uploads:
        raise SnellaValueError("no photos given: add 3 to 6 photos of the subject")
    if len(uploads) > MAX_PHOTOS:
        raise SnellaValueError(f"{len(uploads)} photos given; at most {MAX_PHOTOS} are taken")
    pictures = _decode([Path(upload) for upload in uploads])
    folder.mkdir(parents=True)
    stored = [folder / f"photo-{index:02d}.png" for index in range(len(pictures))]
    for picture, target in zip(pictures, stored, strict=True):
        picture.save(target)
    return stored


def _decode(paths: Sequence[Path]) -> list[Image.Image]:
    pictures, bad = [], []
    for path in paths:
        try:
            picture = open_photo(path)
        except ValueError as error:
            bad.append(f"{path.name} {error}")
            continue
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        picture.info.clear()  # camera, place and time stay out of what is stored
        pictures.append(picture)
    if bad:
        raise SnellaValueError("; ".join(bad))
    return pictures
