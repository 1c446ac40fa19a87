"""Checkpoints that are whole or absent: safetensors and JSON, a manifest of digests, one rename.

    checkpoints/step-000100/   <group>.safetensors ...   state.json   manifest.json (written last)

A folder is filled under a temporary name, flushed, read back and verified, then renamed. No pickle
is written or read. The manifest holds step, size and SHA-256 of every file; each file also holds
the step it belongs to. All of it is verified before anything loads.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from snell_diffusion.training.checkpoint_files import (
    Manifest,
    parse_json,
    read_manifest,
    read_verified,
)
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.files import (
    abandoned,
    cannot_write,
    remove,
    sweep,
    sync_path,
    temporary_name,
)

_NAME = re.compile(r"step-(\d{6,})")
_REPLACED = re.compile(r"\.tmp-(\d{1,10})-replaced-(step-\d{6,})")

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: `tensors[group][name]` and plain JSON `state`."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]


def _write(path: Path, data: bytes) -> tuple[int, str]:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data), hashlib.sha256(data).hexdigest()


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

        What was written is read back and verified before it is published, and only then does an
        older one go: one verified checkpoint is there at any time.

        Args:
            step: Optimizer steps done, 0 or more; `state["step"]` becomes the same.
            tensors: Tensors by group and name; a group's name is lower-case letters, digits and _.
            state: Plain JSON values.

        Raises:
            CheckpointError: The disk refused the write; earlier checkpoints are untouched.
        """
        final = self.path(step)
        temporary = self.root / temporary_name(final.name)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.restore_replaced()
            sweep(self.root)
            temporary.mkdir()
            self._fill(temporary, step, tensors, {**state, "step": step})
            self.load(temporary)
            self._publish(temporary, final)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {cannot_write(final, error)} (earlier checkpoints are untouched)"
            ) from error
        finally:
            remove(temporary)
        self._prune(keep=step)
        return final

    def _fill(self, folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        written = {}
        for group, values in tensors.items():
            plain = {k: v.detach().cpu().contiguous().clone() for k, v in values.items()}
            name = f"{group}.safetensors"
            written[name] = _write(folder / name, save_tensors(plain, {"step": str(step)}))
        written["state.json"] = _write(folder / "state.json", json.dumps(state).encode())
        _write(folder / "manifest.json", Manifest(step, written).to_json())
        sync_path(folder)

    def _publish(self, temporary: Path, final: Path) -> None:
        replaced = self.root / temporary_name(f"replaced-{final.name}")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync_path(self.root)
        remove(replaced)

    def _prune(self, keep: int) -> None:
        """Remove the oldest beyond the limit; only after `keep` is published."""
        if self.limit is None:
            return
        older = [step for step in self.steps() if step != keep]
        for step in older[: max(0, len(older) - (self.limit - 1))]:
            self._withdraw(self.path(step))

    def _withdraw(self, folder: Path) -> None:
        """Remove a published folder: out of sight first, so that a crash leaves no part of it."""
        hidden = self.root / temporary_name(folder.name)
        try:
            folder.rename(hidden)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {folder} is beyond the limit of {self.limit}, but could not be "
                f"removed: {error.strerror or error}; check its permissions"
            ) from error
        remove(hidden)

    def restore_replaced(self) -> None:
        """Put back a checkpoint whose replacement was interrupted between its two renames."""
        if not self.root.is_dir():
            return
        for entry in self.root.iterdir():
            match = _REPLACED.fullmatch(entry.name)
            if match and abandoned(int(match[1])):
                final = self.root / match[2]
                if not final.exists():
                    entry.rename(final)

    def load(self, path: Path) -> Checkpoint:
        """Read and verify one checkpoint folder.

        Files that the manifest does not name are not looked at.

        Raises:
            CheckpointError: It is missing or damaged; the message names the file and what is wrong.
        """
        manifest = read_manifest(path)
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest.step:
            raise CheckpointError(
                f"checkpoint {path}: manifest.json is of step {manifest.step}, not of step "
                f"{int(named[1])}: the folder was renamed or mixed with another"
            )
        data = {name: read_verified(path, name, manifest) for name in manifest.files}
        state = parse_json(path / "state.json", data.pop("state.json"))
        if state.get("step") != manifest.step:
            raise CheckpointError(
                f"checkpoint file {path / 'state.json'} is of step {state.get('step')!r}, the "
                f"manifest of step {manifest.step}: files of two checkpoints were mixed"
            )
        tensors = {
            name.removesuffix(".safetensors"): _tensors(path / name, content, manifest.step)
            for name, content in data.items()
        }
        return Checkpoint(path, manifest.step, tensors, state)

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; each damaged one stepped over is told to `warn`."""
        for step in reversed(self.steps()):
            try:
                return self.load(self.path(step))
            except CheckpointError as error:
                warn(f"{error}; trying the one before")
        return None


def _tensors(path: Path, data: bytes, step: int) -> dict[str, Tensor]:
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from error
    said = header.get("__metadata__", {}).get("step")
    if said != str(step):
        raise CheckpointError(
            f"checkpoint file {path} is of step {said}, the manifest of step {step}: files of two "
            f"checkpoints were mixed"
        )
    return tensors
