"""Writes that a crash cannot leave half done: temp file, fsync, rename."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snell_diffusion.adapters.container import sync_folder


def process_alive(pid: int) -> bool:
    """Whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_with(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let `write` fill a temporary sibling of `path`, then rename it into place.

    Args:
        path: Final file; its folder must exist.
        write: Called with the temporary path (same suffix as `path`).
        durable: Also fsync the file and its folder. False for files that are only informative.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace the content of `path` by `text` (UTF-8) in one step."""
    write_with(path, lambda temporary: temporary.write_text(text, "utf-8"), durable=durable)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace the content of `path` by `value` as JSON in one step."""
    write_text(path, json.dumps(value, indent=1) + "\n", durable=durable)
