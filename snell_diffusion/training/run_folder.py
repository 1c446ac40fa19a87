"""The folder of one run: when it may be written to, and what a resumed run must match."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.checkpoints import Checkpoint, CheckpointFolder
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.files import cannot_write, process_alive, remove, sweep

__all__ = ["RunFolder", "require_same"]


class RunFolder:
    """Files of a run below its folder.

    Args:
        path: The folder.
        files: Names of files that a run writes there.
        folders: Names of folders that a run writes there, "checkpoints" among them.
        overwrite: Whether an earlier run may be replaced.
        resume: The checkpoint to continue from: latest, auto, a folder, or None.
        limit: Checkpoints to keep; None keeps all.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[str],
        folders: Sequence[str],
        *,
        overwrite: bool,
        resume: str | None,
        limit: int | None,
    ) -> None:
        self.path = path
        self._files, self._folders = tuple(files), tuple(folders)
        self._overwrite, self._resume = overwrite, resume
        self.checkpoints = CheckpointFolder(path / "checkpoints", limit)

    def check(self) -> None:
        """Refuse a folder that another run is using, or whose results would be lost.

        Raises:
            SnellaConfigError: Says which, and what to do.
        """
        self._require_unused()
        if self._resume or self._overwrite:
            return
        found = [name for name in (*self._files, "checkpoints") if (self.path / name).exists()]
        if found:
            raise SnellaConfigError(
                f"run folder '{self.path}' holds an earlier run ({', '.join(found[:4])}); choose "
                f"another output_dir, continue it with --resume_from_checkpoint latest, or replace "
                f"it with --overwrite"
            )

    def _require_unused(self) -> None:
        status = self._status()
        pid, created = status.get("pid"), status.get("created")
        ended = status.get("state") in ("finished", "stopped", "failed")
        another = isinstance(pid, int) and pid >= 1 and pid != os.getpid()
        if not ended and another:
            if not process_alive(pid, created if isinstance(created, float) else None):
                return
            raise SnellaConfigError(
                f"run folder '{self.path}' is in use by process {pid}; wait, stop it, or choose "
                f"another output_dir"
            )

    def _status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "status.json").read_text("utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def take(self) -> None:
        """Make the folder ready to be written to: the first change of a run on disk.

        What killed processes left unfinished is removed; so is what an earlier run wrote (nothing
        else), if it may be replaced.

        Raises:
            SnellaConfigError: Another run took the folder while this one was loading.
            OutputError: The disk does not let us.
        """
        self._require_unused()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.checkpoints.restore_replaced()
        for folder in (self.path, *(self.path / name for name in self._folders)):
            sweep(folder)
        if self._overwrite and not self._resume:
            for name in self.written():
                remove(self.path / name)

    def written(self) -> list[str]:
        """Names of what a run that replaces another takes away."""
        return [*self._files, *self._folders]

    def find_checkpoint(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to continue from, verified.

        Raises:
            CheckpointError: There is none, or the one named is damaged.
        """
        wanted = self._resume
        if wanted is None:
            return None
        self.checkpoints.restore_replaced()
        if wanted not in ("latest", "auto"):
            return self.checkpoints.load(Path(wanted))
        checkpoint = self.checkpoints.latest(warn)
        if checkpoint is None and wanted == "latest":
            raise CheckpointError(
                f"resume_from_checkpoint is 'latest', but '{self.checkpoints.root}' holds no valid "
                f"checkpoint; use 'auto' to start anew in that case"
            )
        return checkpoint


def require_same(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings.

    Args:
        checkpoint: What is continued; its state says under "identity" which run it belongs to.
        now: The identity of this run, plain JSON values.

    Raises:
        CheckpointError: Lists every difference, field by field.
    """
    then = checkpoint.state.get("identity")
    if not isinstance(then, dict):
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: state.json does not say which run it belongs to"
        )
    missing = "nothing"
    differing = sorted(
        k for k in then.keys() | now.keys() if then.get(k, missing) != now.get(k, missing)
    )
    if differing:
        lines = "; ".join(
            f"{k}: {then.get(k, missing)!r} then, {now.get(k, missing)!r} now" for k in differing
        )
        raise CheckpointError(
            f"checkpoint {checkpoint.path} belongs to a run with other settings: {lines}. Continue "
            f"with the settings in {checkpoint.path.parent.parent / 'config.yaml'}, or start anew "
            f"in another output_dir"
        )
