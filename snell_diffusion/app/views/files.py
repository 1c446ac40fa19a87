"""Files that a visitor may fetch: copies in gradio's cache, under names that say what they are."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from gradio.processing_utils import hash_file, save_file_to_cache
from gradio.utils import get_upload_folder


def cached(path: Path, name: str | None = None) -> str:
    """A copy of a file that may be served, made once per content.

    Args:
        path: The file.
        name: What the copy is called; default: as the file.
    """
    if name is None:
        return save_file_to_cache(path, get_upload_folder())
    return _stored(hash_file(path), name, lambda target: shutil.copyfile(path, target))


def cached_text(text: str, name: str) -> str:
    """A text as a file that may be served, called `name`."""
    data = text.encode()
    digest = hashlib.sha256(data).hexdigest()
    return _stored(digest, name, lambda target: target.write_bytes(data))


def _stored(digest: str, name: str, write: Callable[[Path], object]) -> str:
    """Gradio keeps a file below a folder that is named by its digest; so does this."""
    folder = Path(get_upload_folder()) / digest
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if target.is_file():
        os.utime(target)  # the cache is cleared by age
        return str(target)
    handle, staged = tempfile.mkstemp(dir=folder, prefix=".")
    os.close(handle)
    write(Path(staged))
    os.replace(staged, target)
    return str(target)
