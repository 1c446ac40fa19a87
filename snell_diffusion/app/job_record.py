"""What the files of a run say about it: its state in one word, its steps, and why it failed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_diffusion.app.reasons import printed_since, reason

ENDED = ("finished", "stopped", "paused", "failed")
_WRITTEN_ENDS = ("finished", "stopped", "failed")  # as the trainer writes them
_GOING = {"pause": "pausing", "stop": "stopping"}
_AT_REST = {"pause": "paused", "stop": "stopped"}


@dataclass(frozen=True)
class JobStatus:
    """Where a run is.

    Attributes:
        state: One of ENDED; anything else, as the trainer calls it, is going on.
        step: Optimizer steps done.
        total: Optimizer steps wanted; 0 while unknown.
        eta_s: Seconds left, None while unknown.
        message: Why a run failed and what to do, else empty.
        resumable: Whether it can be continued from a saved state. An ended run that is neither
            finished nor resumable can be started again from its beginning.
    """

    state: str
    step: int = 0
    total: int = 0
    eta_s: float | None = None
    message: str = ""
    resumable: bool = False

    @property
    def running(self) -> bool:
        """Whether processes of the run exist."""
        return self.state not in ENDED


@dataclass(frozen=True)
class SavedState:
    """A checkpoint: optimizer steps done, bytes on the disk, seconds since the epoch."""

    step: int
    size: int
    saved: float


def derive_status(folder: Path, info: Mapping[str, Any], alive: bool, saved: bool) -> JobStatus:
    """A run's status from its files.

    Args:
        folder: Of the job.
        info: Its job.json.
        alive: Whether processes of it exist; found out before this reads status.json.
        saved: Whether it has a checkpoint.
    """
    written = read_json(folder / "run" / "status.json")
    # A run that was resumed shows the end of its earlier part until the trainer is up again.
    fresh = bool(written) and written.get("updated", 0.0) >= info["began"]
    asked, state, message = info.get("asked"), written.get("state", "starting"), ""
    if alive:
        state = _while_alive(state if fresh else "starting", asked)
    elif fresh and state == "finished":
        pass
    elif asked in _AT_REST:
        state = _AT_REST[asked]
        if not (fresh and written.get("state") in _WRITTEN_ENDS):
            message = "It was ended before it could save; what was saved earlier is kept."
    elif fresh and state == "stopped":
        pass
    else:
        state, message = "failed", _why(folder, info, written if fresh else {})
    return JobStatus(
        state,
        written.get("step", 0),
        written.get("total", 0),
        written.get("eta_s") if fresh and alive else None,
        message,
        resumable=saved and not alive and state != "finished",
    )


def _while_alive(state: str, asked: str | None) -> str:
    if asked in _GOING:
        return _GOING[asked]
    return "finishing" if state in _WRITTEN_ENDS else state  # the process is about to end


def _why(folder: Path, info: Mapping[str, Any], written: Mapping[str, Any]) -> str:
    message = written.get("message") if written.get("state") == "failed" else ""
    printed = printed_since(folder / "train.log", info.get("log_start", 0))
    return reason(message or "", printed, info.get("exit"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table, or an empty one where there is none; files are replaced whole, never edited."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
