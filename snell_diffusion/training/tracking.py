"""What a run tells: log.jsonl always, status.json for watchers, a progress bar, trackers."""

import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from snell_diffusion.training.errors import OutputError
from snell_diffusion.training.files import cannot_write, write_json, write_text

Event = dict[str, Any]
OnEvent = Callable[[Event], None]
_STATUS_SECONDS = 0.5


def peak_memory(device: torch.device) -> int:
    """Most memory used so far in bytes: GPU tensors on CUDA, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Log:
    """A file of lines, each on its way to the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, line: str) -> None:
        data = memoryview(f"{line}\n".encode())
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[self._file.write(data) :]
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def close(self) -> None:
        self._file.close()


class Tracker:
    """Records the events of one run; a process that is not the main one records nothing.

    Args:
        folder: Run folder, or None to write no file (dry run).
        total: Optimizer steps of the whole run.
        on_event: Called with every event.
        remote: Called with (numbers, step) for TensorBoard or W&B.
        main: False on the other processes of a distributed run.
        quiet: Show nothing on the screen.
    """

    def __init__(
        self,
        folder: Path | None,
        total: int,
        on_event: OnEvent | None = None,
        remote: Callable[[dict[str, float], int], None] | None = None,
        main: bool = True,
        quiet: bool = False,
    ) -> None:
        self._quiet = quiet
        self.folder = folder if main else None
        self.total = total
        self.main = main
        self.history: list[Event] = []
        self._on_event = on_event
        self._remote = remote
        self._bar: tqdm[Any] | None = None
        self._log = None if self.folder is None else _Log(self.folder / "log.jsonl")
        created = psutil.Process().create_time()
        self._status: Event = {"pid": os.getpid(), "created": created, "total": total, "step": 0}
        self._written = 0.0
        self._first: tuple[int, float] | None = None

    def event(self, kind: str, **values: Any) -> None:
        """Record one event; `values` must be plain JSON values.

        Raises:
            OutputError: The disk does not take the line.
        """
        if not self.main:
            return
        entry: Event = {"event": kind, **values}
        self.history.append(entry)
        if self._log is not None:
            self._log.append(json.dumps(entry))
        if self._on_event is not None:
            self._on_event(entry)

    def step(self, step: int, **numbers: Any) -> None:
        """Record one optimizer step and show it."""
        if not self.main:
            return
        eta = self._eta(step)
        self.event("step", step=step, **numbers)
        self.remote(numbers, step)
        self.status("training", step=step, eta_s=eta, **numbers)
        self._show(step, numbers)

    def remote(self, numbers: dict[str, Any], step: int) -> None:
        """Pass numbers to TensorBoard or W&B, where one was asked for."""
        if self._remote is not None:
            self._remote({k: v for k, v in numbers.items() if v is not None}, step)

    def status(self, state: str, *, force: bool = False, **values: Any) -> None:
        """Update status.json: at most twice a second, at once where the state changes."""
        force = force or state != self._status.get("state")
        self._status.update(values, state=state)
        now = time.monotonic()
        if self.folder is not None and (force or now - self._written > _STATUS_SECONDS):
            entry = {**self._status, "updated": time.time()}
            write_json(self.folder / "status.json", entry, durable=False)
            self._written = now

    def _eta(self, step: int) -> float | None:
        """Seconds left from the mean time per step of this process, None after its first step."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return None
        done, since = step - self._first[0], now - self._first[1]
        return round(since / done * (self.total - step), 1)

    def _show(self, step: int, numbers: dict[str, Any]) -> None:
        if self._quiet:
            return
        if self._bar is None:
            self._bar = tqdm(total=self.total, initial=step - 1, desc="train", mininterval=0.5)
        parts = {"loss": f"{numbers['loss']:.4f}", "lr": f"{numbers['lr']:.1e}"}
        if numbers.get("kept_share") is not None:
            parts["kept"] = f"{numbers['kept_share']:.0%}"
        parts["mem"] = f"{numbers['memory'] / 2**30:.2f}G"
        self._bar.set_postfix(parts, refresh=False)
        self._bar.update()

    def note(self, message: str) -> None:
        """Print a line for the user, above the progress bar, and record it."""
        if self.main:
            if not self._quiet:
                tqdm.write(message)
            self.event("note", message=message)

    def ended(self, error: BaseException, state: str) -> None:
        """Update status.json at the end of a run that did not finish."""
        # A disk that refuses this too must not hide why the run ended.
        with suppress(OutputError):
            self.status(state, force=True, message=str(error) or type(error).__name__)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step` from a log, so that a resumed run writes them only once."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that a crash cut short
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


def read_log(path: Path) -> list[Event]:
    """All events of a log.jsonl, oldest first."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
