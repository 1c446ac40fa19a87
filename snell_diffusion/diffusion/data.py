"""Photos on disk -> checked, upright, square RGB tensors with a prompt each.

Every photo is opened and fully decoded before a model is loaded; all bad ones are named at once.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.decoding import PhotoError, read_photo
from snell_diffusion.errors import SnellaConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OTHER_IMAGES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".svg", ".eps")
MAX_PHOTOS = 500


@dataclass(frozen=True)
class Photo:
    """One checked photo: its file, its prompt, and the SHA-256 of its bytes."""

    path: Path
    prompt: str
    digest: str


def find_photos(
    folder: str | Path, prompt: str, use_captions: bool = True, most: int | None = MAX_PHOTOS
) -> list[Photo]:
    """List and check every photo of a folder, sorted by name.

    Other files are ignored, but pictures in formats that are not read (heic, gif, ...) are errors,
    because they would be missed without a word.

    Args:
        folder: Folder with jpg, png or webp files, not searched recursively.
        prompt: Prompt of photos without a caption of their own.
        use_captions: Take captions from `name.txt`, else from metadata.jsonl (file_name, text).
        most: Refuse more photos than this before any is opened; None takes any number.

    Raises:
        SnellaConfigError: No such folder, no photo in it, too many, or bad photos or captions (all
            of them named).
    """
    folder = Path(folder)
    files = list_files(folder)
    candidates = [p for p in files if p.suffix.lower() in SUFFIXES]
    if most is not None and len(candidates) > most:
        raise SnellaConfigError(
            f"photo folder '{folder}' holds {len(candidates)} photos, at most {most} are taken; "
            f"a subject needs 3 to 30, so leave the best ones there"
        )
    bad = {p.name: "is not jpg, png or webp" for p in files if p.suffix.lower() in _OTHER_IMAGES}
    captions = _read_metadata(folder) if use_captions else {}
    photos = []
    for path in candidates:
        try:
            _, digest = read_photo(path)
            text = _caption(path, captions, prompt) if use_captions else prompt
            photos.append(Photo(path, text, digest))
        except PhotoError as error:
            bad[path.name] = str(error)
    if bad:
        lines = "; ".join(f"{name} {reason}" for name, reason in sorted(bad.items()))
        raise SnellaConfigError(f"{len(bad)} bad file(s) in photo folder '{folder}': {lines}")
    if not photos:
        raise SnellaConfigError(f"photo folder '{folder}' holds no jpg, png or webp file")
    return photos


def list_files(folder: Path) -> list[Path]:
    """Visible files of a folder, sorted by name.

    Raises:
        SnellaConfigError: No such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        raise SnellaConfigError(f"photo folder '{folder}' does not exist or is not a folder")
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise SnellaConfigError(
            f"photo folder '{folder}' cannot be listed: {error.strerror}"
        ) from error


def duplicates(photos: list[Photo]) -> list[str]:
    """Names of photos whose bytes equal an earlier one's."""
    first: dict[str, Photo] = {}
    return [p.path.name for p in photos if first.setdefault(p.digest, p) is not p]


def _read_metadata(folder: Path) -> dict[str, str]:
    path = folder / "metadata.jsonl"
    try:
        lines = (_text(path) or "").splitlines()
    except PhotoError as error:
        raise SnellaConfigError(f"caption file {path} {error}") from error
    captions = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, text = _entry(line, f"{path} line {number}")
            if not os.path.lexists(folder / name):
                raise SnellaConfigError(
                    f"{path} line {number}: the folder holds no '{name[:80]}'; correct file_name "
                    f"or remove the line"
                )
            captions[name] = text
    return captions


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        name, text = entry["file_name"], entry["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name, text = None, None
    if not (isinstance(name, str) and isinstance(text, str) and text.strip()):
        raise SnellaConfigError(
            f'{where}: expected {{"file_name": ..., "text": ...}} with two texts, got {line[:80]}'
        )
    return name, text.strip()


def _caption(path: Path, captions: dict[str, str], prompt: str) -> str:
    sidecar = path.with_suffix(".txt")
    try:
        text = _text(sidecar)
    except PhotoError as error:
        raise PhotoError(f"has a caption {sidecar.name} that {error}") from error
    if text is None:
        return captions.get(path.name, prompt)
    if not text.strip():
        raise PhotoError(f"has an empty caption {sidecar.name}")
    return text.strip()


def _text(path: Path) -> str | None:
    """Content of a caption file, None if there is none."""
    if not os.path.lexists(path):
        return None
    try:
        if path.is_file():
            return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PhotoError("is not UTF-8 text") from error
    except OSError as error:
        raise PhotoError(f"cannot be read ({error.strerror})") from error
    raise PhotoError("is not a regular file")


def square(
    image: Image.Image, size: int, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """Resize the shorter side to `size` and crop a square.

    Args:
        image: RGB picture.
        size: Side of the result in pixels.
        crop: Where the square sits along x and y, 0 (left, top) to 1; 0.5 is the centre.
        flip: Mirror left and right.

    Returns:
        Tensor [3, size, size], uint8.
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = round((width - size) * crop[0]), round((height - size) * crop[1])
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(-1) if flip else pixels.contiguous()


def to_square(
    image: Image.Image, size: int, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """The same square as the models take it, float32 in [-1, 1]."""
    return to_unit(square(image, size, crop, flip))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def data_digest(photos: list[Photo]) -> str:
    """SHA-256 over file bytes and prompts, in order: what a resumed run must find again."""
    text = "\n".join(f"{p.digest} {p.prompt}" for p in photos)
    return hashlib.sha256(text.encode()).hexdigest()
