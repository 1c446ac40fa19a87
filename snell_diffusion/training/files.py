"""Writes that a crash cannot leave half done: temp file, fsync, rename; and their litter swept.

Whatever is unfinished is called `.tmp-<process id>-<name>`. A process that is killed leaves it
behind; the next run in the same folder removes what belongs to no living process.
"""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from snell_diffusion.adapters.atomic import sync_path
from snell_diffusion.adapters.disk import disk_of
from snell_diffusion.training.errors import OutputError

_TEMPORARY = re.compile(r"\.tmp-(\d{1,10})-.+", re.DOTALL)
_CLOCK_SECONDS = 5.0  # the clock that start times are counted from may be corrected
_ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space within your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "make that disk writable",
}


def process_alive(pid: int, created: float | None = None) -> bool:
    """Whether a process with this id, 1 or more, exists on this machine.

    Args:
        pid: Its id. Ids are used again: in a new container by quite other programs.
        created: When it was started, in seconds since the epoch; None asks for the id alone.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    if created is None:
        return True
    try:
        return abs(psutil.Process(pid).create_time() - created) < _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False


def cannot_write(path: Path, error: OSError, setting: str = "output_dir") -> OutputError:
    """The error for a write that the disk refused: which file, why, which disk, what to do.

    Args:
        path: What was to be written.
        error: Why it was not.
        setting: The setting that says where such files go.
    """
    advice = _ADVICE.get(error.errno or 0, "check its permissions")
    return OutputError(
        f"{path} could not be written: {error.strerror or error}; {disk_of(path)}; {advice}, or "
        f"choose another {setting}"
    )


def temporary_name(name: str) -> str:
    """What `name` is called while this process works on it."""
    return f".tmp-{os.getpid()}-{name}"


def abandoned(pid: int) -> bool:
    """Whether nobody works on what is named after this process id any more.

    What is under this process's own id counts too, for in a container every run has the same id:
    ask this only before this process writes there.
    """
    return pid in (0, os.getpid()) or not process_alive(pid)


def sweep(folder: Path, older: float = 0.0) -> None:
    """Remove the unfinished files and folders of dead processes from `folder` (no subfolders).

    Those under this process's own id go too, see `abandoned`.

    Args:
        folder: Where to look; it may be missing.
        older: Leave what was touched within that many seconds. Above 0 where processes of other
            machines or containers write too: whether they live cannot be told from here.

    Raises:
        OutputError: Something cannot be removed.
    """
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and abandoned(int(match[1])) and _untouched(entry) >= older:
            remove(entry)


def _untouched(path: Path) -> float:
    """Seconds since something was last written; endless if it is gone by now."""
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except FileNotFoundError:
        return math.inf


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; one that is already gone is fine.

    Raises:
        OutputError: It cannot be removed.
    """
    # Asked first: a read-only disk refuses to remove even what is not there.
    if not os.path.lexists(path):
        return
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"{path} could not be removed: {error.strerror or error}; check its permissions"
        ) from error


def write_with(
    path: Path,
    write: Callable[[Path], object],
    *,
    durable: bool = True,
    mark: str = "",
    setting: str = "output_dir",
) -> None:
    """Let `write` fill a temporary sibling of `path`, then rename it into place.

    Args:
        path: Final file; its folder is made if it is missing.
        write: Called with the temporary path (same suffix as `path`).
        durable: Also fsync the file and its folder. False for files that are only informative.
        mark: Tells this write from one of another machine or container under the same process id,
            where such may write the same file; begins the temporary name.
        setting: The setting that says where such files go, for the error.

    Raises:
        OutputError: The disk refused the write; `path` is what it was before.
    """
    temporary = path.with_name(temporary_name(f"{mark}{path.name}"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_path(path.parent)
    except OSError as error:
        raise cannot_write(path, error, setting) from error
    finally:
        # On a disk that refuses writes this is refused too; the next sweep removes what is left.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace the content of `path` by `text` (UTF-8) in one step; raises `OutputError`."""
    write_with(path, lambda temporary: temporary.write_text(text, "utf-8"), durable=durable)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace the content of `path` by `value` as JSON in one step; raises `OutputError`."""
    write_text(path, json.dumps(value, indent=1) + "\n", durable=durable)
