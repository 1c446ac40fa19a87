"""Files are put in place whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from snell_diffusion.adapters import atomic
from snell_diffusion.errors import SnellaFileError


def test_write_makes_folders_and_leaves_one_file_with_the_usual_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    before = os.umask(0o027)
    try:
        atomic.write_atomic(path, b"123")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"123"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SnellaFileError, match=r"3 bytes could not be written .No space left"):
        atomic.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SnellaFileError, match=r"file/a\.safetensors: cannot be written"):
        atomic.write_atomic(tmp_path / "file" / "a.safetensors", b"")
