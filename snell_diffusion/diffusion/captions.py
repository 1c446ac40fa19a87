"""Captions of photos: a text file beside a photo, or a line in the folder's metadata.jsonl."""

import json
import os
from pathlib import Path

from snell_diffusion.diffusion.decoding import PhotoError
from snell_diffusion.errors import SnellaConfigError


class Captions:
    """The captions of one folder. `name.txt` wins over metadata.jsonl.

    Args:
        folder: Photo folder.
        column: Key of the caption in the lines of metadata.jsonl, beside file_name.

    Raises:
        SnellaConfigError: metadata.jsonl cannot be read, or names a file that is not there.
    """

    def __init__(self, folder: Path, column: str = "text") -> None:
        self._folder = folder
        self._lines = _read_metadata(folder, column)

    def of(self, path: Path) -> str | None:
        """The caption of a photo; None without one.

        Raises:
            PhotoError: Its text file is empty or cannot be read.
        """
        sidecar = path.with_suffix(".txt")
        try:
            text = _text(sidecar)
        except PhotoError as error:
            raise PhotoError(f"has a caption {sidecar.name} that {error}") from error
        if text is None:
            return self._lines.get(path.relative_to(self._folder).as_posix())
        if not text.strip():
            raise PhotoError(f"has an empty caption {sidecar.name}")
        return text.strip()


def _read_metadata(folder: Path, column: str) -> dict[str, str]:
    path = folder / "metadata.jsonl"
    try:
        lines = (_text(path) or "").splitlines()
    except PhotoError as error:
        raise SnellaConfigError(f"caption file {path} {error}") from error
    captions = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, text = _entry(line, column, f"{path} line {number}")
            if not os.path.lexists(folder / name):
                raise SnellaConfigError(
                    f"{path} line {number}: the folder holds no '{name[:80]}'; correct file_name "
                    f"or remove the line"
                )
            captions[name] = text
    return captions


def _entry(line: str, column: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        name, text = entry["file_name"], entry[column]
    except (ValueError, KeyError, TypeError, RecursionError):
        name, text = None, None
    if not (isinstance(name, str) and isinstance(text, str) and text.strip()):
        raise SnellaConfigError(
            f'{where}: expected {{"file_name": ..., "{column}": ...}} with two texts, got '
            f"{line[:80]}"
        )
    return name, text.strip()


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
