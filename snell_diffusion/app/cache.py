"""The folder of uploads and shown pictures: how large it is, and what goes."""

import shutil
import time
from pathlib import Path

DAY, MINUTE = 86_400, 60  # seconds


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def sweep(cache: Path) -> None:
    """Remove what is older than a day, and empty files older than a minute.

    gradio removes what is a day old too, but forgets what an earlier server left, and leaves an
    empty file behind for every upload that it hands to a function.
    """
    now = time.time()
    for entry in cache.iterdir():
        try:
            status = entry.lstat()
            age = now - status.st_mtime
            folder = entry.is_dir() and not entry.is_symlink()
            if folder and age > DAY:
                shutil.rmtree(entry)
            elif not folder and age > (DAY if status.st_size else MINUTE):
                entry.unlink()
        except FileNotFoundError:  # gradio was quicker
            continue
