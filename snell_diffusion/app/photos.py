"""Uploaded photos: decoded once under limits, stored upright and without their metadata."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from snell_diffusion.app.limits import LIMITS
from snell_diffusion.diffusion.data import Photo, Search, find_photos
from snell_diffusion.diffusion.decoding import PhotoError, open_photo
from snell_diffusion.diffusion.likeness import duplicates, enlarged, near_duplicates
from snell_diffusion.errors import printable

MAX_SIDE = 1024  # pixels; stored photos are scaled down to this
FEW = 3  # fewer photos than this hardly show what makes the subject
LONGEST_NAME = 60  # characters of an upload's name that are shown
EVERYTHING = Search(captions=False)


def decode(upload: Path) -> Image.Image:
    """An upload as upright RGB of at most MAX_SIDE pixels a side, without metadata.

    Raises:
        PhotoError: Why it is not taken, starting with a verb: "is empty".
    """
    size = upload.stat().st_size
    if size > LIMITS.upload_bytes:  # the server's own limit has to let adapter files pass
        most = LIMITS.upload_bytes >> 20
        raise PhotoError(f"has {size / 2**20:.1f} MB; a photo of up to {most} MB is taken")
    picture = open_photo(upload)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    picture.info.clear()  # camera, place and time stay out of what is stored
    return picture


def shown_name(upload: str | Path) -> str:
    """The name that a person knows an upload by: no folder, no control characters, not long."""
    name = printable(Path(upload).name)
    return name if len(name) <= LONGEST_NAME else f"...{name[-LONGEST_NAME + 3 :]}"


def notes(folder: Path, names: Mapping[str, str], side: int | None = None) -> list[str]:
    """What is worth a look about stored photos, a sentence each: the trainer's own checks.

    Args:
        folder: With the stored photos.
        names: What a person calls each file.
        side: Pixels a side that the base is trained at; None leaves the size out.
    """
    photos = find_photos(folder, "", EVERYTHING) if names else []
    lines = []
    if 0 < len(photos) < FEW:
        lines.append(
            f"Only {len(photos)} so far. Three is the least that works; five to ten are better."
        )
    lines += _twins(photos, names)
    if side is not None:
        lines += [
            f"{names[photo.path.name]} is smaller than the {side} pixels that this model learns "
            f"at, and is enlarged: it will look soft."
            for photo in photos
            if enlarged([photo], [(side, side)])
        ]
    return lines


def _twins(photos: Sequence[Photo], names: Mapping[str, str]) -> list[str]:
    equal = [f"{names[name]} is there twice: remove one of them." for name in duplicates(photos)]
    alike = [
        f"{names[later]} looks like {names[earlier]}. What is the same in all photos is learned "
        "as part of the subject, so different photos teach more."
        for earlier, later in near_duplicates(photos)
    ]
    return equal + alike
