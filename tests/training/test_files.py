"""Writes are whole or absent, their errors name file and disk, and what dies is swept."""

import errno
import fcntl
import os
from pathlib import Path

import psutil
import pytest

from snell_diffusion.adapters.atomic import write_atomic
from snell_diffusion.training import files
from snell_diffusion.training.errors import OutputError

DEAD, LIVING = 999_999_999, 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b" / "text", "é")
    assert (tmp_path / "a" / "b" / "text").read_text("utf-8") == "é"
    assert names(tmp_path / "a" / "b") == ["text"]


@pytest.mark.parametrize(
    "code, advice",
    [
        (errno.ENOSPC, "free space there, or choose another output_dir"),
        (errno.EDQUOT, "free space within your quota"),
        (errno.EFBIG, "raise the limit on file sizes"),
        (errno.EROFS, "make that disk writable, or choose another output_dir"),
        (errno.EIO, "check its permissions, or choose another output_dir"),
    ],
)
def test_a_refused_write_keeps_the_old_file(tmp_path: Path, code: int, advice: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(code, os.strerror(code))

    said = rf"file could not be written: {os.strerror(code)}; the disk at /.* free; {advice}"
    with pytest.raises(OutputError, match=said) as refused:
        files.write_with(path, refuse)
    assert refused.value.exit_code == 2
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_sweep_removes_what_belongs_to_no_other_living_process(tmp_path: Path) -> None:
    for pid in (DEAD, LIVING, os.getpid(), 0, 10**10 - 1):
        (tmp_path / f".tmp-{pid}-file").write_text("x")
        (tmp_path / f".tmp-{pid}-folder").mkdir()
        (tmp_path / f".tmp-{pid}-folder" / "more").write_text("x")
    (tmp_path / ".tmp-theirs").write_text("x")
    (tmp_path / "tmp-1-x").write_text("x")
    files.sweep(tmp_path)
    kept = [".tmp-1-file", ".tmp-1-folder", ".tmp-theirs", "tmp-1-x"]
    assert names(tmp_path) == kept
    files.sweep(tmp_path / "nowhere")


def test_sweep_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / f".tmp-{DEAD}-link").symlink_to(tmp_path / "kept")
    files.sweep(tmp_path)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]


def test_the_disk_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert "MiB free" in files.disk_of(tmp_path / "a" / "b")


def stale(folder: Path) -> Path:
    """What a process that was killed in `write_atomic` leaves."""
    path = folder / ".adapter.safetensors.ab12_xyz"
    path.write_bytes(b"half")
    return path


@pytest.mark.row("R1")
def test_the_next_adapter_sweeps_what_a_dead_process_left(tmp_path: Path) -> None:
    stale(tmp_path)
    others = (".adapter.safetensors.bak", ".other.safetensors.ab12_xyz", "adapter.safetensors.x")
    for name in others:
        (tmp_path / name).write_text("not ours")
    write_atomic(tmp_path / "adapter.safetensors", b"whole")
    assert names(tmp_path) == sorted(["adapter.safetensors", *others])
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"whole"


@pytest.mark.row("R1")
def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    """A child holds its unfinished file, as `write_atomic` does, until it is killed."""
    path, (ready, wait) = stale(tmp_path), (os.pipe(), os.pipe())
    pid = os.fork()
    if pid == 0:
        fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX)
        os.write(ready[1], b"x")
        os.read(wait[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        write_atomic(tmp_path / "adapter.safetensors", b"whole")
        assert names(tmp_path) == [path.name, "adapter.safetensors"]
    finally:
        os.write(wait[1], b"x")
        os.waitpid(pid, 0)
        for descriptor in (*ready, *wait):
            os.close(descriptor)
    write_atomic(tmp_path / "adapter.safetensors", b"again")
    assert names(tmp_path) == ["adapter.safetensors"]


def test_the_temporary_file_of_an_adapter_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(source: str, target: Path) -> None:
        with Path(source).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", check)
    write_atomic(tmp_path / "adapter.safetensors", b"whole")
    assert names(tmp_path) == ["adapter.safetensors"]


def test_an_id_that_is_used_again_is_not_the_process_it_was() -> None:
    created = psutil.Process().create_time()
    assert files.process_alive(os.getpid())
    assert files.process_alive(os.getpid(), created + 1)
    assert not files.process_alive(os.getpid(), created - 3600)
    assert not files.process_alive(DEAD, created)
