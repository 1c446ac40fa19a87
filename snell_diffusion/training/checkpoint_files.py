"""The manifest of a checkpoint, and reading the files it names without trusting any of them."""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_diffusion.training.errors import CheckpointError

FORMAT = 2
MAX_JSON_BYTES = 64 * 2**20
MAX_FILE_BYTES = 64 * 2**30

_FILE = re.compile(r"[a-z][a-z0-9_]{0,63}\.safetensors|state\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of: its step, and (bytes, SHA-256) of every file by plain name."""

    step: int
    files: dict[str, tuple[int, str]]

    def to_json(self) -> bytes:
        files = {name: {"bytes": n, "sha256": d} for name, (n, d) in self.files.items()}
        return json.dumps({"format": FORMAT, "step": self.step, "files": files}, indent=1).encode()


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`; every value is checked.

    Raises:
        CheckpointError: It is missing, damaged, of another format, or names files elsewhere.
    """
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {folder}; name one in full, such as "
            f"<output_dir>/checkpoints/step-000100, or use 'latest'"
        )
    if not os.path.lexists(path):
        raise CheckpointError(f"checkpoint {folder} is not complete: it has no manifest.json")
    table = parse_json(path, _read(path, MAX_JSON_BYTES))
    if table.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {table.get('format')!r}, this version reads {FORMAT}; "
            f"continue it with the version of snell_diffusion that wrote it, or start anew"
        )
    step, files = table.get("step"), table.get("files")
    if table.keys() != {"format", "step", "files"} or not _is_count(step):
        raise CheckpointError(f"checkpoint {folder}: manifest.json is damaged: step {step!r}")
    if not isinstance(files, dict) or "state.json" not in files:
        raise CheckpointError(f"checkpoint {folder}: manifest.json is damaged: it lists no files")
    return Manifest(int(step), {name: _entry(folder, name, row) for name, row in files.items()})  # type: ignore[arg-type]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_FILE_BYTES


def _entry(folder: Path, name: str, row: Any) -> tuple[int, str]:
    if not _FILE.fullmatch(name):
        raise CheckpointError(
            f"checkpoint {folder}: manifest.json names {name!r}; only state.json and "
            f"<group>.safetensors in the folder itself are read"
        )
    if isinstance(row, dict) and row.keys() == {"bytes", "sha256"}:
        size, digest = row["bytes"], row["sha256"]
        largest = MAX_JSON_BYTES if name == "state.json" else MAX_FILE_BYTES
        known = _is_count(size) and size <= largest and isinstance(digest, str)
        if known and _DIGEST.fullmatch(digest):
            return size, digest
    raise CheckpointError(
        f"checkpoint {folder}: manifest.json is damaged: {name} has {row!r}, expected bytes and "
        f"sha256"
    )


def read_verified(folder: Path, name: str, manifest: Manifest) -> bytes:
    """The bytes of a file that `manifest` names, if they are those it was written with.

    Raises:
        CheckpointError: The file is missing, is no regular file, or has other bytes.
    """
    size, digest = manifest.files[name]
    data = _read(folder / name, size)
    if len(data) != size:
        raise CheckpointError(
            f"checkpoint file {folder / name} is damaged: {len(data)} of {size} bytes are there"
        )
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"checkpoint file {folder / name} is damaged: its SHA-256 differs from the manifest"
        )
    return data


def _read(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; links and pipes are refused, never followed."""
    try:
        with open(path, "rb", opener=_open_itself) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"checkpoint file {path} is not a regular file")
            if status.st_size > limit:
                raise CheckpointError(
                    f"checkpoint file {path} is damaged: {status.st_size} bytes, expected {limit} "
                    f"at most"
                )
            return file.read()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file {path} is missing or unreadable ({error.strerror})"
        ) from error


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON table from the bytes of `path`.

    Raises:
        CheckpointError: They are something else, or name a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    try:
        table = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint file {path} is damaged: it is not valid JSON ({error})"
        ) from error
    if not isinstance(table, dict):
        raise CheckpointError(
            f"checkpoint file {path} is damaged: expected a JSON table, got {type(table).__name__}"
        )
    return table
