"""Photos on disk -> checked, upright, square RGB tensors with a prompt each.

Every photo is opened and fully decoded before a model is loaded; all bad ones are named at once.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from snell_diffusion.errors import SnellaConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
_OTHER_IMAGES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".svg", ".eps")
MAX_PIXELS = 50_000_000
MIN_SIDE = 16


@dataclass(frozen=True)
class Photo:
    """One checked photo: its file, its prompt, and the SHA-256 of its bytes."""

    path: Path
    prompt: str
    digest: str


def find_photos(folder: str | Path, prompt: str, use_captions: bool = True) -> list[Photo]:
    """List and check every photo of a folder, sorted by name.

    Other files are ignored, but pictures in formats that are not read (heic, gif, ...) are errors,
    because they would be missed without a word.

    Args:
        folder: Folder with jpg, png or webp files, not searched recursively.
        prompt: Prompt of photos without a caption of their own.
        use_captions: Take captions from `name.txt`, else from metadata.jsonl (file_name, text).

    Raises:
        SnellaConfigError: No such folder, no photo in it, or bad photos or captions (all named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SnellaConfigError(f"photo folder '{folder}' does not exist or is not a folder")
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    bad = {p.name: "is not jpg, png or webp" for p in files if p.suffix.lower() in _OTHER_IMAGES}
    captions = _read_metadata(folder) if use_captions else {}
    photos = []
    for path in (p for p in files if p.suffix.lower() in SUFFIXES):
        try:
            open_photo(path)
            text = _caption(path, captions, prompt) if use_captions else prompt
            photos.append(Photo(path, text, hashlib.sha256(path.read_bytes()).hexdigest()))
        except ValueError as error:
            bad[path.name] = str(error)
    if bad:
        lines = "; ".join(f"{name} {reason}" for name, reason in sorted(bad.items()))
        raise SnellaConfigError(f"{len(bad)} bad file(s) in photo folder '{folder}': {lines}")
    if not photos:
        raise SnellaConfigError(f"photo folder '{folder}' holds no jpg, png or webp file")
    return photos


def duplicates(photos: list[Photo]) -> list[str]:
    """Names of photos whose bytes equal an earlier one's."""
    seen: set[str] = set()
    return [p.path.name for p in photos if p.digest in seen or seen.add(p.digest)]  # type: ignore[func-returns-value]


def _read_metadata(folder: Path) -> dict[str, str]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[str(entry["file_name"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise SnellaConfigError(
                f'{path} line {number}: expected {{"file_name": ..., "text": ...}}, got {line[:80]}'
            ) from error
    return captions


def _caption(path: Path, captions: dict[str, str], prompt: str) -> str:
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
        return captions.get(path.name, prompt)
    try:
        text = sidecar.read_text("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"has a caption {sidecar.name} that is not UTF-8 text") from error
    if not text:
        raise ValueError(f"has an empty caption {sidecar.name}")
    return text


def open_photo(path: Path) -> Image.Image:
    """Decode one photo to upright RGB: EXIF orientation applied, transparency on white.

    Raises:
        ValueError: It is not a whole jpg, png or webp of at most `MAX_PIXELS` pixels and at least
            `MIN_SIDE` pixels on each side. The message starts with a verb ("is ...").
    """
    if not path.is_file():
        raise ValueError("is not a regular file")
    try:
        with warnings.catch_warnings():
            # Size is checked below with a message of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image.size)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError("is not a jpg, png or webp file, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"has more than {MAX_PIXELS // 10**6} million pixels") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"is {width}x{height}, more than {MAX_PIXELS // 10**6} million pixels")
    if min(size) < MIN_SIDE:
        raise ValueError(f"is {width}x{height}, below {MIN_SIDE} pixels on a side")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: PIL's own conversion to 8 bits clips instead of scaling.
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_square(
    image: Image.Image, size: int, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """Resize the shorter side to `size` and crop a square.

    Args:
        image: RGB picture.
        size: Side of the result in pixels.
        crop: Where the square sits along x and y, 0 (left, top) to 1; 0.5 is the centre.
        flip: Mirror left and right.

    Returns:
        Tensor [3, size, size], float32 in [-1, 1].
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = round((width - size) * crop[0]), round((height - size) * crop[1])
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels


def data_digest(photos: list[Photo]) -> str:
    """SHA-256 over file bytes and prompts, in order: what a resumed run must find again."""
    text = "\n".join(f"{p.digest} {p.prompt}" for p in photos)
    return hashlib.sha256(text.encode()).hexdigest()
