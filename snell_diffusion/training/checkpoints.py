"""Checkpoints that are whole or absent: safetensors and JSON, a manifest of digests, one rename.

    checkpoints/step-000100/   <group>.safetensors ...   state.json   manifest.json (written last)

A folder is filled under a temporary name, every file is flushed, then it is renamed. No pickle is
written or read. The manifest holds the SHA-256 of every file and is verified before anything loads.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.files import process_alive, sync_folder

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = re.compile(r"\.tmp-step-\d{6,}-(\d+)")

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: `tensors[group][name]` and plain JSON `state`."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]


def _write(path: Path, data: bytes) -> str:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


class CheckpointFolder:
    """The checkpoints of one run, newest last.

    Args:
        root: Folder that holds `step-NNNNNN` folders; other names in it are ignored.
        limit: How many to keep, at least 1; None keeps all.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"checkpoints_total_limit must be at least 1, got {limit}")
        self.root = root
        self.limit = limit

    def steps(self) -> list[int]:
        """Steps with a published checkpoint, ascending (not yet verified)."""
        if not self.root.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.root.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
        """Publish one checkpoint, then remove those beyond the limit.

        Raises:
            CheckpointError: The disk refused the write; earlier checkpoints are untouched.
        """
        final = self.path(step)
        temporary = self.root / f".tmp-{final.name}-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            temporary.mkdir()
            self._fill(temporary, step, tensors, state)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(self.root)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {final} could not be written: {error.strerror or error}; "
                f"free space or choose another output_dir (earlier checkpoints are untouched)"
            ) from error
        self._prune(keep=step)
        return final

    def _fill(self, folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        digests = {}
        for group, values in tensors.items():
            plain = {k: v.detach().cpu().contiguous().clone() for k, v in values.items()}
            digests[f"{group}.safetensors"] = _write(
                folder / f"{group}.safetensors", save_tensors(plain)
            )
        digests["state.json"] = _write(folder / "state.json", json.dumps(state).encode())
        manifest = {"format": FORMAT, "step": step, "sha256": digests}
        _write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(folder)

    def _prune(self, keep: int) -> None:
        """Remove the oldest beyond the limit; only after `keep` is published."""
        if self.limit is None:
            return
        older = [step for step in self.steps() if step != keep]
        for step in older[: max(0, len(older) - (self.limit - 1))]:
            shutil.rmtree(self.path(step))

    def _sweep(self) -> None:
        for entry in self.root.iterdir():
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (int(match[1]) == os.getpid() or not process_alive(int(match[1]))):
                shutil.rmtree(entry)

    def load(self, path: Path) -> Checkpoint:
        """Read and verify one checkpoint folder.

        Raises:
            CheckpointError: It is missing or damaged; the message names the file and what is wrong.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_bytes())
            if manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {path} has format {manifest['format']}, "
                    f"this version reads {FORMAT}"
                )
            digests, step = dict(manifest["sha256"]), int(manifest["step"])
        except FileNotFoundError as error:
            raise CheckpointError(
                f"checkpoint {path} is not complete: it has no manifest.json"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path}: manifest.json is damaged") from error
        data = {name: self._verified(path / name, digest) for name, digest in digests.items()}
        try:
            state = json.loads(data.pop("state.json"))
            tensors = {
                name.removesuffix(".safetensors"): load_tensors(v) for name, v in data.items()
            }
        except (KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        return Checkpoint(path, step, tensors, state)

    @staticmethod
    def _verified(path: Path, digest: str) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"checkpoint file {path} is missing or unreadable") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(
                f"checkpoint file {path} is damaged: its SHA-256 differs from the manifest"
            )
        return data

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; each damaged one stepped over is told to `warn`."""
        for step in reversed(self.steps()):
            try:
                return self.load(self.path(step))
            except CheckpointError as error:
                warn(f"{error}; trying the one before")
        return None
