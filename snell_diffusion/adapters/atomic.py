"""Writes a file in one step: a reader, or a crash, sees the old one or the new one whole."""

import fcntl
import os
import re
import tempfile
from pathlib import Path

from snell_diffusion.adapters.disk import disk_of
from snell_diffusion.errors import SnellaFileError

__all__ = ["sync_path", "write_atomic"]


def write_atomic(path: Path, data: bytes) -> None:
    """Put a file in place in one step: a reader, or a crash, sees the old one or the new one whole.

    Raises:
        SnellaFileError: The folder or disk does not take the file; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_stale(path)
        handle, temporary = _locked_temporary(path)
    except OSError as error:
        raise SnellaFileError(
            f"{path}: cannot be written ({error.strerror}); {disk_of(path)}; choose another folder"
        ) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            os.fsync(stream.fileno())
            os.replace(temporary, path)  # while it is locked
        sync_path(path.parent)
    except OSError as error:
        raise SnellaFileError(
            f"{path}: {len(data)} bytes could not be written ({error.strerror}); "
            f"{disk_of(path)}; free space there or choose another folder"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _locked_temporary(path: Path) -> tuple[int, str]:
    """A new temporary sibling of `path`, open and locked until it is closed."""
    while True:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        _lock(handle)
        # Another process may have swept it before it was locked.
        if os.path.exists(temporary):
            return handle, temporary
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file without waiting; False if someone holds it or the disk has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep_stale(path: Path) -> None:
    """Remove temporary siblings of `path` that a killed process left: those nobody has locked."""
    stale = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")
    for entry in path.parent.iterdir():
        if not stale.fullmatch(entry.name):
            continue
        try:
            handle = os.open(entry, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone by now, or not a file of ours
        try:
            if _lock(handle):
                entry.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk: what is renamed after survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
