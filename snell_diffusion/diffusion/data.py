"""Photos on disk -> checked, upright RGB pictures with a prompt, and perhaps a mask, each.

Every photo is opened and fully decoded before a model is loaded; all bad ones are named at once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from snell_diffusion.diffusion.captions import Captions
from snell_diffusion.diffusion.decoding import PhotoError, read_photo
from snell_diffusion.diffusion.framing import Size
from snell_diffusion.diffusion.masks import FOLDER, Mask, by_photo, check_mask, is_mask
from snell_diffusion.errors import SnellaConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_OTHER_IMAGES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".svg", ".eps")
MAX_PHOTOS = 500
_THUMBNAIL = (16, 16)


@dataclass(frozen=True)
class Photo:
    """One checked photo, and what a run does with it.

    Attributes:
        path: Its file.
        prompt: Its caption, or the prompt of its folder.
        digest: SHA-256 of the file's bytes, hex.
        size: Height and width, upright, in pixels.
        thumbnail: It at 16 x 16, RGB bytes, to tell what looks alike.
        captioned: Whether the prompt is its own caption.
        mask: What of it counts; None = all of it.
        concept: Number of the concept that it belongs to.
        templates: Prompts of which one is drawn for each sample; none = always `prompt`.
        prior_prompt: The prompt of its class.
        repeats: How often it comes in an epoch.
        weight: Factor on its loss.
    """

    path: Path
    prompt: str
    digest: str
    size: Size
    thumbnail: bytes = field(repr=False)
    captioned: bool = False
    mask: Mask | None = None
    concept: int = 0
    templates: tuple[str, ...] = ()
    prior_prompt: str = ""
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class Search:
    """What is looked for in a photo folder.

    Attributes:
        captions: Take captions from `name.txt`, else from metadata.jsonl.
        caption_column: Key of the caption in metadata.jsonl.
        recursive: Also look into the folders inside.
        most: Refuse more photos than this before any is opened; None takes any number.
    """

    captions: bool = True
    caption_column: str = "text"
    recursive: bool = False
    most: int | None = MAX_PHOTOS


_USUAL = Search()


def find_photos(folder: str | Path, prompt: str, search: Search = _USUAL) -> list[Photo]:
    """List and check every photo of a folder with its caption and mask, sorted by name.

    Other files are ignored, but pictures in formats that are not read (heic, gif, ...) are errors,
    because they would be missed without a word.

    Args:
        folder: Folder with jpg, png or webp files.
        prompt: Prompt of photos without a caption of their own.
        search: What is looked for.

    Raises:
        SnellaConfigError: No such folder, no photo in it, too many, or bad photos, captions or
            masks (all of them named).
    """
    folder = Path(folder)
    files = list_files(folder, search.recursive)
    masks = by_photo(_mask_files(folder, files))
    candidates = [p for p in files if p.suffix.lower() in SUFFIXES and not is_mask(p)]
    most = search.most
    if most is not None and len(candidates) > most:
        raise SnellaConfigError(
            f"photo folder '{folder}' holds {len(candidates)} photos, at most {most} are taken; "
            f"a subject needs 3 to 30, so leave the best ones there"
        )
    bad = {p.name: "is not jpg, png or webp" for p in files if p.suffix.lower() in _OTHER_IMAGES}
    for stem in masks.keys() - {path.with_suffix("") for path in candidates}:
        bad |= {path.name: "is a mask without a photo" for path in masks[stem]}
    captions = Captions(folder, search.caption_column) if search.captions else None
    photos = []
    for path in candidates:
        try:
            photos.append(_photo(path, prompt, captions, masks.get(path.with_suffix(""), [])))
        except PhotoError as error:
            bad[path.relative_to(folder).as_posix()] = str(error)
    if bad:
        lines = "; ".join(f"{name} {reason}" for name, reason in sorted(bad.items()))
        raise SnellaConfigError(f"{len(bad)} bad file(s) in photo folder '{folder}': {lines}")
    if not photos:
        raise SnellaConfigError(f"photo folder '{folder}' holds no jpg, png or webp file")
    return photos


def _photo(path: Path, prompt: str, captions: Captions | None, masks: Sequence[Path]) -> Photo:
    picture, digest = read_photo(path)
    mask = check_mask(masks, picture)
    caption = None if captions is None else captions.of(path)
    return Photo(
        path=path,
        prompt=prompt if caption is None else caption,
        digest=digest,
        size=picture.size[::-1],
        thumbnail=picture.resize(_THUMBNAIL, Image.Resampling.BOX).tobytes(),
        captioned=caption is not None,
        mask=mask,
    )


def list_files(folder: Path, recursive: bool = False) -> list[Path]:
    """Visible files of a folder (and of those inside, except folders of masks), sorted by name.

    Raises:
        SnellaConfigError: No such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        raise SnellaConfigError(f"photo folder '{folder}' does not exist or is not a folder")
    try:
        found = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise SnellaConfigError(
            f"photo folder '{folder}' cannot be listed: {error.strerror}"
        ) from error
    inner = [p for p in found if recursive and _is_inner(p)]
    return [p for p in found if p not in inner] + [q for p in inner for q in list_files(p, True)]


def _is_inner(path: Path) -> bool:
    # Links are not followed, for they can lead around in a circle.
    return path.is_dir() and not path.is_symlink() and path.name != FOLDER


def _mask_files(folder: Path, files: Sequence[Path]) -> list[Path]:
    folders = dict.fromkeys([folder, *(path.parent for path in files)])
    inner = [p for f in folders if (f / FOLDER).is_dir() for p in list_files(f / FOLDER)]
    return [path for path in [*files, *inner] if is_mask(path)]


def data_digest(photos: Sequence[Photo]) -> str:
    """SHA-256 over file bytes, prompts and masks, in order: what a resumed run must find again."""
    text = "\n".join(_identity(photo) for photo in photos)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(photo: Photo) -> str:
    masked = "" if photo.mask is None else f" mask {photo.mask.digest}"
    concept = f" concept {photo.concept}" if photo.concept else ""
    return f"{photo.digest} {photo.prompt}{masked}{concept}"
