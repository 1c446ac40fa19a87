"""Training runs of the app: a folder and a child process each; all state is on disk.

    <root>/<id>/photos/        checked uploads
    <root>/<id>/settings.yaml  the configuration given to the training script
    <root>/<id>/job.json       label, facts, times, process id, what was asked of the run
    <root>/<id>/train.log      what the process printed
    <root>/<id>/run/           the run folder: status.json, log.jsonl, samples/, adapter

So a reloaded page, a second browser and a restarted server all see the same runs.

Pause and stop ask the trainer for the same thing: it saves its state, writes the adapter of that
moment and ends. They differ in what the run is then called, and in that the adapter of a stopped
run is handed out and that of a paused one is not. A separate command that makes an adapter file of
a checkpoint would have to load the base model once more, for minutes where it is large.
"""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from snell_diffusion.app import processes
from snell_diffusion.app.event_log import Event, EventLogs
from snell_diffusion.app.ids import is_id, new_id
from snell_diffusion.app.job_record import JobStatus, SavedState, derive_status, read_json
from snell_diffusion.app.processes import GRACE, launch_command
from snell_diffusion.app.reasons import refused
from snell_diffusion.diffusion.run_folder import ADAPTER_FILES
from snell_diffusion.errors import SnellaError, SnellaValueError
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import OutputError
from snell_diffusion.training.files import sweep, write_json, write_text

SCRIPT = Path(__file__).resolve().parents[2] / "train_dreambooth_snella.py"
STATES_KEPT = 2  # checkpoints of a run that lie on the disk
SAVES = 10  # checkpoints over a run whose settings do not say how many
_SHEET = re.compile(r"step-(\d{6,})\.png")
_DELETED = ".deleted-"


class Jobs:
    """All runs of one user, below one folder.

    Args:
        root: Holds a folder per run; may be missing yet.
        script: Training script.
        lock: Shared by all who may start runs on this server.
        busy: Whether any run on this server trains; asked under the lock. By default this user's.
    """

    def __init__(
        self,
        root: Path,
        script: Path = SCRIPT,
        lock: Any = None,
        busy: Callable[[], bool] | None = None,
    ) -> None:
        self.root = root.resolve()
        self.script = script
        self._lock = lock or threading.RLock()
        self._busy = busy or (lambda: self.active() is not None)
        self._watches: dict[str, threading.Thread] = {}
        self._ending: set[str] = set()
        self._logs = EventLogs()
        for half in self.root.glob(f"{_DELETED}*"):
            shutil.rmtree(half, ignore_errors=True)

    # -- what is there ----------------------------------------------------------------------------

    def folder(self, job: str) -> Path:
        """Folder of a run; ids are 32 hex digits and nothing else reaches the disk.

        Raises:
            SnellaValueError: No such run.
        """
        if not is_id(job):
            raise SnellaValueError("choose a run from the list; this is not the id of one")
        if not (self.root / job).is_dir():
            raise SnellaValueError("this run is no longer there; choose another from the list")
        return self.root / job

    def all(self) -> list[str]:
        """Ids of the runs that were started, newest first."""
        found = {p.parent.name: read_json(p) for p in self.root.glob("*/job.json")}
        started = {
            job: record.get("started", 0.0)
            for job, record in found.items()
            if is_id(job) and record
        }
        return sorted(started, key=lambda job: (started[job], job), reverse=True)

    def info(self, job: str) -> dict[str, Any]:
        """What job.json holds: label, facts, started (seconds since the epoch), pid, created.

        Raises:
            SnellaValueError: No such run, or it was never started.
        """
        record = read_json(self.folder(job) / "job.json")
        if not record:
            raise SnellaValueError("this run was not started; choose another from the list")
        return record

    def settings(self, job: str) -> dict[str, Any]:
        """The configuration that a run was started with."""
        return dict(yaml.safe_load((self.folder(job) / "settings.yaml").read_text("utf-8")))

    def status(self, job: str) -> JobStatus:
        """State, steps, time left and reason of a run."""
        folder = self.folder(job)
        alive = self.alive(job)  # before status.json: a run that ends in between has written it
        saved = bool(CheckpointFolder(folder / "run" / "checkpoints").steps())
        return derive_status(folder, self.info(job), alive, saved)

    def seconds(self, job: str) -> float:
        """How long a run was going, over all its parts; pauses do not count."""
        info = self.info(job)
        since = time.time() - info["began"] if self.alive(job) else 0.0
        return float(info.get("spent", 0.0)) + max(0.0, since)

    def events(self, job: str) -> list[Event]:
        """What the trainer logged so far, oldest first."""
        return self._logs.events(self.folder(job) / "run" / "log.jsonl")

    def samples(self, job: str) -> list[tuple[int, Path]]:
        """(optimizer step, picture) of the sample sheets drawn so far, in this order."""
        names = [(_SHEET.fullmatch(p.name), p) for p in self._inside(job, "samples")]
        return sorted((int(name[1]), path) for name, path in names if name)

    def checkpoints(self, job: str) -> list[SavedState]:
        """The states that the run can continue from, oldest first."""
        folder = CheckpointFolder(self.folder(job) / "run" / "checkpoints")
        found = []
        for step in folder.steps():
            with suppress(FileNotFoundError):  # the trainer removes old ones meanwhile
                files = [path.stat() for path in folder.path(step).iterdir()]
                size = sum(file.st_size for file in files)
                found.append(SavedState(step, size, folder.path(step).stat().st_mtime))
        return found

    def _inside(self, job: str, name: str) -> list[Path]:
        folder = self.folder(job) / "run" / name
        return list(folder.iterdir()) if folder.is_dir() else []

    def has_adapter(self, job: str) -> bool:
        """Whether `adapter` has a file to give."""
        return self._adapter(job) is not None

    def adapter(self, job: str) -> Path:
        """The adapter file of a run that is finished or was stopped.

        Raises:
            SnellaValueError: There is none (yet).
        """
        path = self._adapter(job)
        if path is None:
            raise SnellaValueError(
                "this run has no adapter yet: wait until it is finished, or stop it after some "
                "steps"
            )
        return path

    def _adapter(self, job: str) -> Path | None:
        if self.status(job).state not in ("finished", "stopped"):
            return None
        paths = [self.folder(job) / "run" / name for name in ADAPTER_FILES.values()]
        return next((path for path in paths if path.is_file()), None)

    # -- what can be done -------------------------------------------------------------------------

    def new(self) -> str:
        """Make the folder of a new run and return its id.

        Raises:
            SnellaError: The disk is full.
        """
        job = new_id()
        with _disk():
            (self.root / job).mkdir(parents=True)
        return job

    def start(
        self,
        job: str,
        settings: Mapping[str, Any],
        label: str,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Start `accelerate launch` for a run in a session of its own.

        Args:
            job: From `new`.
            settings: Of the training script; without `checkpointing_steps` the state is saved
                after about every tenth of the run.
            label: What the run is called in lists.
            facts: Plain values to show: subject, base, method and the like.

        Raises:
            SnellaError: The training script is missing, another run is going, or the disk is full.
        """
        if not self.script.is_file():
            raise SnellaError(
                f"training needs a checkout of the project: {self.script.name} is not in "
                f"{self.script.parent.name}"
            )
        with self._lock:
            self._require_free()
            folder = self.folder(job)
            values = {**_resumable(settings), "output_dir": str(folder / "run")}
            known = {"method": values.get("method", "snella"), **(facts or {})}
            record = {"label": label, "facts": known, "started": time.time()}
            with _disk():
                write_text(folder / "settings.yaml", yaml.safe_dump(values, sort_keys=False))
                self._spawn(job, record, resume=False)

    def resume(self, job: str) -> None:
        """Continue a run from its newest state; one that saved none starts anew.

        Raises:
            SnellaError: It is going or finished, another run is going, or the disk is full.
        """
        with self._lock:
            status = self.status(job)
            if self.alive(job):
                raise SnellaValueError("this run is going already")
            if status.state == "finished":
                raise SnellaValueError("this run is finished: start a new one to train further")
            self._require_free()
            with _disk():
                self._spawn(job, self.info(job), resume=True)

    def pause(self, job: str) -> None:
        """Ask a run to save its state and end; `resume` continues it."""
        self._ask(job, "pause")

    def stop(self, job: str) -> None:
        """Ask a run to save its state and its adapter and end; it can be resumed all the same."""
        self._ask(job, "stop")

    def delete(self, job: str) -> None:
        """Remove a run with all its files.

        Raises:
            SnellaValueError: No such run, or it is going.
        """
        with self._lock:
            folder = self.folder(job)
            if (folder / "job.json").is_file() and self.alive(job):
                raise SnellaValueError("this run is going: stop it first, then delete it")
            hidden = self.root / f"{_DELETED}{job}"  # at once: no half of a run is ever listed
            folder.rename(hidden)
            self._watches.pop(job, None)
        shutil.rmtree(hidden, ignore_errors=True)

    def active(self) -> str | None:
        """Id of the run that trains now, or None."""
        return next((job for job in self.all() if self.alive(job)), None)

    def alive(self, job: str) -> bool:
        """Whether any process of the run still exists, also after a restart of this server."""
        watch = self._watches.get(job)
        if watch is not None:
            return watch.is_alive()
        if "ended" in self.info(job):
            return False
        with self._lock:  # a run that is being started has no process yet
            info = self.info(job)
            if job not in self._watches and "ended" not in info:
                self._watch(job, info, None)
        watch = self._watches.get(job)
        return watch is not None and watch.is_alive()

    # -- processes --------------------------------------------------------------------------------

    def _require_free(self) -> None:
        if self._busy():
            raise SnellaValueError("a run is going already: wait for it or stop it first")

    def _config(self, job: str) -> Path:
        return self.root / job / "settings.yaml"

    def _spawn(self, job: str, record: dict[str, Any], resume: bool) -> None:
        folder = self.folder(job)
        log = folder / "train.log"
        start = log.stat().st_size if log.is_file() else 0
        earlier = {key: value for key, value in record.items() if key not in ("ended", "exit")}
        record = {**earlier, "began": time.time(), "log_start": start, "asked": None}
        # Written before there is a process, so that a server that dies now finds it all the same.
        write_json(folder / "job.json", {**record, "pid": 0, "created": 0.0}, durable=False)
        child = processes.spawn(launch_command(self.script, self._config(job), resume), log)
        record = {**record, "pid": child.pid, "created": processes.created(child.pid)}
        self._watch(job, record, child)
        with suppress(OutputError):  # the process is found by its command line then
            write_json(folder / "job.json", record, durable=False)

    def _watch(
        self, job: str, info: Mapping[str, Any], child: "subprocess.Popen[bytes] | None"
    ) -> None:
        """Follow a run to its end, unless nothing of it is left: then settle it at once."""
        leader = (info["pid"], info["created"])
        found = [] if child or processes.lives(*leader) else processes.members(self._config(job))
        if info["pid"] == 0 and found:
            leader = min(((p.pid, processes.created(p.pid)) for p in found), key=lambda x: x[1])
        if child or found or processes.lives(*leader):
            target, arguments = self._follow, (job, leader, child)
            self._watches[job] = threading.Thread(target=target, args=arguments, daemon=True)
            self._watches[job].start()
        else:
            self._watches[job] = threading.Thread()  # never started, so never alive
            self._settle(job, None)

    def _follow(
        self, job: str, leader: tuple[int, float], child: "subprocess.Popen[bytes] | None"
    ) -> None:
        code = processes.wait_for_leader(child, *leader)
        # A trainer that lost its launcher saves and ends, but not while it is still loading.
        processes.end(self._config(job), GRACE, ask=True)
        self._settle(job, code)

    def _settle(self, job: str, code: int | None) -> None:
        """Record the end of a run's processes and remove what they left unfinished."""
        run = self.root / job / "run"
        clear_unfinished(run)
        with self._lock:
            info = read_json(self.root / job / "job.json")
            ended = time.time()
            if code is None:  # it ended while nobody looked
                ended = read_json(run / "status.json").get("updated", ended)
            if info:
                spent = info.get("spent", 0.0) + max(0.0, ended - info["began"])
                self._note(job, ended=ended, exit=code, spent=spent)

    def _ask(self, job: str, what: str) -> None:
        info = self.info(job)
        if not self.alive(job):
            if self.status(job).state == "paused":
                self._note(job, asked=what)
            return
        self._note(job, asked=what)
        if job in self._ending:
            return
        self._ending.add(job)
        if info.get("asked") is None:  # a second SIGINT would end the run without saving
            trainer = read_json(self.folder(job) / "run" / "status.json").get("pid")
            processes.ask_to_end(trainer, self._config(job))
        threading.Thread(target=self._end, args=(job,), daemon=True).start()

    def _end(self, job: str) -> None:
        try:
            processes.end(self._config(job), GRACE)
        finally:
            self._ending.discard(job)

    def _note(self, job: str, **values: Any) -> None:
        with self._lock, suppress(OutputError):
            record = {**self.info(job), **values}
            write_json(self.folder(job) / "job.json", record, durable=False)


def clear_unfinished(run: Path) -> None:
    """Remove the temporary files that dead processes left in a run folder: they only take room."""
    with suppress(OutputError, OSError):
        CheckpointFolder(run / "checkpoints").restore_replaced()
        for folder in (run, run / "samples", run / "checkpoints"):
            sweep(folder)


def _resumable(settings: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(settings)
    if values.get("checkpointing_steps") is None:
        values["checkpointing_steps"] = max(1, values.get("max_train_steps", SAVES) // SAVES)
        values["checkpoints_total_limit"] = STATES_KEPT
    return values


@contextmanager
def _disk() -> Iterator[None]:
    """Turn a disk's refusal into a sentence that names no place of the server."""
    try:
        yield
    except (OSError, OutputError) as error:
        raise SnellaError(refused(error)) from error
