"""Runs of the trainer in forked processes: started at once, stopped in any way, compared by bytes.

The process that runs the tests has torch, diffusers and the trainer imported and keeps to one
thread, so a fork of it is a fresh trainer within milliseconds. What goes wrong in a run (see
`faults.py`) is put in after the fork: the trainer itself knows nothing of it.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

import train_dreambooth_snella
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_text
from snell_diffusion.diffusion.feedback import RunFeedback
from snell_diffusion.diffusion.training import run
from snell_diffusion.training.checkpoints import CheckpointFolder
from tests.diffusion.training_runs import config

ADAPTER = "pytorch_snella_weights.safetensors"
CRASHED = 99  # exit code of a child that ended with an exception nobody expected

Work = Callable[[], int]
Install = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit code (or minus the signal), all it printed, seconds of computing."""

    code: int
    said: str
    cpu_seconds: float


def no_fault() -> None:
    """Install nothing: an undisturbed run."""


def small_run(base: Path, folder: Path, **changes: Any) -> TrainConfig:
    """The smallest run with all that a checkpoint holds: 4 steps, one checkpoint each, one kept."""
    values = {
        "num_validation_photos": 0,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "train_batch_size": 1,
    }
    return config(base, folder, **{**values, **changes})


def resume(settings: TrainConfig, step: int) -> None:
    """Resume a run in a child to its end; it must continue after `step`, not start over."""
    assert_finished(train(resumed(settings, "auto")))
    starts = [e["step"] for e in events(Path(settings.output_dir)) if e["event"] == "start"]
    assert starts[-1] == step


def resumed(settings: TrainConfig, how: str = "latest") -> TrainConfig:
    return replace(settings, resume_from_checkpoint=how)


# -- children -------------------------------------------------------------------------------------


def start(work: Work, log: Path) -> int:
    """Fork a child that does `work`, prints to `log` and exits with the code that it returns."""
    assert torch.get_num_threads() == 1, "a process with compute threads cannot be forked safely"
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = CRASHED
    try:
        AcceleratorState._reset_state(reset_partial_state=True)  # of other tests of the parent
        gc.freeze()  # a collection must not walk, and so copy, the memory of the parent
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return 0


def wait(pid: int, log: Path) -> Outcome:
    """Wait for a child of `start`."""
    _, status, usage = os.wait4(pid, 0)
    said = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    return Outcome(os.waitstatus_to_exitcode(status), said, usage.ru_utime + usage.ru_stime)


def kill_after(pid: int, cpu_seconds: float) -> None:
    """SIGKILL a child once it has computed for so long: on a busy machine as on an idle one."""
    ticks = os.sysconf("SC_CLK_TCK")
    while True:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        state, used = fields[0], (int(fields[11]) + int(fields[12])) / ticks
        if used >= cpu_seconds or state == "Z":
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.002)


def log_of(settings: TrainConfig) -> Path:
    """Where the child of a run prints: beside the run folder, which only the run writes to."""
    return Path(settings.output_dir).with_suffix(".out")


def trainer(settings: TrainConfig, install: Install = no_fault, pictures: bool = False) -> Work:
    """One run by `run(config)`; without the plots of the end, which take longer than the run."""

    def work() -> int:
        if not pictures:
            RunFeedback.draw_pictures = lambda self: []  # type: ignore[method-assign]
        install()
        run(settings)
        return 0

    return work


def script(arguments: Path, install: Install = no_fault) -> Work:
    """The same through the script, with its exit codes; `arguments` is a YAML file."""

    def work() -> int:
        RunFeedback.draw_pictures = lambda self: []  # type: ignore[method-assign]
        install()
        return train_dreambooth_snella.main(["--config", str(arguments)])

    return work


def train(settings: TrainConfig, install: Install = no_fault, **options: Any) -> Outcome:
    """One run in a child, to its end."""
    log = log_of(settings)
    return wait(start(trainer(settings, install, **options), log), log)


def run_script(
    settings: TrainConfig, install: Install = no_fault, beside: Path | None = None
) -> Outcome:
    """One run in a child by the script, to its end; its own files lie beside a folder."""
    place = beside or Path(settings.output_dir)
    arguments, log = place.with_suffix(".yaml"), place.with_suffix(".out")
    arguments.write_text(config_text(settings), "utf-8")
    return wait(start(script(arguments, install), log), log)


def train_to_the_end(settings: TrainConfig, **options: Any) -> Path:
    """One undisturbed run in a child; its folder."""
    assert_finished(train(settings, **options))
    return Path(settings.output_dir)


def assert_finished(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.said[-3000:]


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Poll until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.002)


# -- what a run leaves ----------------------------------------------------------------------------


def adapter_digest(folder: Path, name: str = ADAPTER) -> str:
    """SHA-256 over the adapter file: its names, shapes, settings and every bit of its tensors."""
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def checkpoints(folder: Path) -> CheckpointFolder:
    return CheckpointFolder(folder / "checkpoints")


def published(folder: Path) -> list[int]:
    """Steps of the published checkpoints, each read and verified."""
    found = checkpoints(folder)
    for step in found.steps():
        found.load(found.path(step))
    return found.steps()


def litter(folder: Path) -> list[str]:
    """Whatever is unfinished or of unknown origin: a run names nothing of its own with a dot."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*"))


def events(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of log.jsonl."""
    found = []
    for line in (folder / "log.jsonl").read_text("utf-8").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def logged_steps(folder: Path) -> list[int]:
    return [event["step"] for event in events(folder) if event["event"] == "step"]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder) if event["event"] == "step"]


def require_nothing_lost(folder: Path) -> int:
    """After a death: all that is published is whole, and the newest ever announced is there.

    Returns:
        The step that a resume must continue from.
    """
    steps = published(folder)
    if (folder / "log.jsonl").is_file():
        said = [event["step"] for event in events(folder) if event["event"] == "checkpoint"]
        assert max(steps, default=0) >= max(said, default=0), "a checkpoint was lost"
    return max(steps, default=0)


def require_same_result(settings: TrainConfig, whole: str) -> None:
    """After the restart: the adapter of the undisturbed run, every step logged once, no litter."""
    folder = Path(settings.output_dir)
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    assert len(events(folder)) == len(lines), "a line of the log is not whole"
    assert adapter_digest(folder) == whole
    assert logged_steps(folder) == list(range(1, settings.max_train_steps + 1))
    assert litter(folder) == []
    assert published(folder)[-1] == settings.max_train_steps


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run folder to damage; `target` must not exist."""
    return Path(shutil.copytree(source, target))


def flip_bit(path: Path, place: float) -> None:
    """Change one bit of a file, `place` from 0 to 1 of its length."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
