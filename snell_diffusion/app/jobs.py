"""Training runs of the app: a folder and a child process each; all state is on disk.

    <root>/<id>/photos/        checked uploads
    <root>/<id>/settings.yaml  the configuration given to the training script
    <root>/<id>/job.json       label, time of start, process id
    <root>/<id>/train.log      what the process printed
    <root>/<id>/run/           the run folder: status.json, log.jsonl, samples/, adapter

So a reloaded page, a second browser and a restarted server all see the same runs.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from snell_diffusion.errors import SnellaError, SnellaValueError

SCRIPT = Path(__file__).resolve().parents[2] / "train_dreambooth_snella.py"
ADAPTER = "pytorch_snella_weights.safetensors"
GRACE = 30.0  # seconds that a stopped run has to save its state
LOG_TAIL = 2000  # characters of train.log that a failure message may quote
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class JobStatus:
    """Where a run is.

    Attributes:
        state: finished, stopped or failed; anything else, as the trainer calls it, is going on.
        step: Optimizer steps done.
        total: Optimizer steps wanted; 0 while unknown.
        eta_s: Seconds left, None while unknown.
        message: Why a run failed, else empty.
    """

    state: str
    step: int = 0
    total: int = 0
    eta_s: float | None = None
    message: str = ""


class Jobs:
    """All runs under one root folder; at most one of them trains at a time."""

    def __init__(self, root: Path, script: Path = SCRIPT) -> None:
        self.root = root.resolve()
        self.script = script
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._start = threading.Lock()

    def folder(self, job: str) -> Path:
        """Folder of a run; ids are 32 hex digits and nothing else reaches the disk.

        Raises:
            SnellaValueError: No such run.
        """
        if not isinstance(job, str) or not re.fullmatch(r"[0-9a-f]{32}", job):
            raise SnellaValueError("choose a run from the list; this is not the id of one")
        if not (self.root / job).is_dir():
            raise SnellaValueError("this run is no longer there; choose another from the list")
        return self.root / job

    def new(self) -> str:
        """Make the folder of a new run and return its id."""
        job = secrets.token_hex(16)
        (self.root / job).mkdir(parents=True)
        return job

    def all(self) -> list[str]:
        """Ids of the runs that were started, newest first."""
        found = [path.parent for path in self.root.glob("*/job.json")]
        found = [path for path in found if re.fullmatch(r"[0-9a-f]{32}", path.name)]
        return [p.name for p in sorted(found, key=lambda p: self.info(p.name)["started"])[::-1]]

    def info(self, job: str) -> dict[str, Any]:
        """What job.json holds: label, started (seconds since the epoch), pid, created."""
        return json.loads((self.folder(job) / "job.json").read_text("utf-8"))

    def start(self, job: str, settings: Mapping[str, Any], label: str) -> None:
        """Start `accelerate launch` for a run in a process group of its own.

        Raises:
            SnellaError: The training script is missing, or another run is going.
        """
        if not self.script.is_file():
            raise SnellaError(
                f"training needs a checkout of the project: {self.script.name} is not in "
                f"{self.script.parent}"
            )
        with self._start:
            if self.active() is not None:
                raise SnellaValueError("a run is going already: wait for it or stop it first")
            self._spawn(job, settings, label)

    def _spawn(self, job: str, settings: Mapping[str, Any], label: str) -> None:
        folder = self.folder(job)
        config = folder / "settings.yaml"
        values = {**settings, "output_dir": str(folder / "run")}
        config.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
        with (folder / "train.log").open("wb") as log:
            child = subprocess.Popen(
                launch_command(self.script, config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[job] = child
        record = {
            "label": label,
            "started": time.time(),
            "pid": child.pid,
            "created": psutil.Process(child.pid).create_time(),
        }
        (folder / "job.json").write_text(json.dumps(record, indent=1), "utf-8")

    def alive(self, job: str) -> bool:
        """Whether the run's process still exists, also after a restart of this server."""
        if job in self._children:
            return self._children[job].poll() is None
        info = self.info(job)
        try:  # the id may belong to another process by now: the time of creation tells
            return psutil.Process(info["pid"]).create_time() == info["created"]
        except psutil.NoSuchProcess:
            return False

    def active(self) -> str | None:
        """Id of the run that trains now, or None."""
        return next((job for job in self.all() if self.alive(job)), None)

    def status(self, job: str) -> JobStatus:
        """State, steps and time left of a run."""
        folder = self.folder(job)
        alive = self.alive(job)  # before status.json: a run that ends in between has written it
        written = read_json(folder / "run" / "status.json")
        state = written.get("state", "starting")
        message = written.get("message") or ""
        if not alive and state not in ENDED:
            state, message = "failed", f"the process ended early. {log_tail(folder / 'train.log')}"
        elif alive and state in ENDED:
            state = "finishing"  # the process is about to end
        return JobStatus(
            state, written.get("step", 0), written.get("total", 0), written.get("eta_s"), message
        )

    def losses(self, job: str) -> list[tuple[int, float]]:
        """(step, training loss) of every logged step."""
        path = self.folder(job) / "run" / "log.jsonl"
        events = read_log(path)
        return [(e["step"], e["loss"]) for e in events if e["event"] == "step"]

    def samples(self, job: str) -> list[Path]:
        """Sample sheets drawn so far, oldest first."""
        return sorted((self.folder(job) / "run" / "samples").glob("step-*.png"))

    def adapter(self, job: str) -> Path:
        """The trained adapter file.

        Raises:
            SnellaValueError: The run has not written one yet.
        """
        path = self.folder(job) / "run" / ADAPTER
        if not path.is_file():
            raise SnellaValueError("this run has no adapter yet: wait until it is finished")
        return path

    def stop(self, job: str) -> None:
        """Ask a run to save its state and end; it is ended for it after GRACE seconds."""
        info = self.info(job)
        if not self.alive(job):
            return
        trainer = read_json(self.folder(job) / "run" / "status.json").get("pid")
        group = info["pid"]
        if trainer is not None and psutil.pid_exists(trainer) and os.getpgid(trainer) == group:
            os.kill(trainer, signal.SIGINT)  # not the launcher, which would leave it alone
        else:
            os.killpg(group, signal.SIGTERM)
        killer = threading.Timer(GRACE, self._kill, (job, group))
        killer.daemon = True
        killer.start()

    def _kill(self, job: str, group: int) -> None:
        if self.alive(job):
            os.killpg(group, signal.SIGKILL)


def launch_command(script: Path, config: Path) -> list[str]:
    """`accelerate launch` of the training script, as an argument list (no shell is involved)."""
    options = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", *options, "--dynamo_backend=no"),
        *(str(script), "--config", str(config)),
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one while the file is not there."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Events of a log.jsonl that may be growing: a last line without its end is left out."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def log_tail(path: Path) -> str:
    """The last line that a process printed, for a message."""
    lines = path.read_text("utf-8", errors="replace")[-LOG_TAIL:].split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f"It last printed: {said[-1]}" if said else "It printed nothing."
