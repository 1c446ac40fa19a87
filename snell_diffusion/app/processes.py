"""Child processes of training runs: started in a session of their own, found again, ended surely.

A run is two processes: `accelerate launch` and the trainer it starts. Either may die alone, and the
server that started them may be gone. So a run's processes are known by the launcher's id with its
time of creation, and by the path of the run's settings on their command lines, which holds the
random id of the run and therefore belongs to nobody else.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from snell_diffusion.training.files import process_alive

GRACE = 60.0  # seconds that a run has to end its step and save before it is ended
LAST_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_LOOK = 0.1  # seconds between two looks at a process


def launch_command(script: Path, config: Path, resume: bool = False) -> list[str]:
    """`accelerate launch` of the training script, as an argument list (no shell is involved).

    Args:
        script: Training script.
        config: YAML file with its settings.
        resume: Continue from the newest checkpoint of the run, or start anew if there is none.
    """
    options = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    more = ["--resume_from_checkpoint", "auto"] if resume else []
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", *options, "--dynamo_backend=no"),
        *(str(script), "--config", str(config), *more),
    ]


def spawn(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a command as the leader of its own session; what it prints is added to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def created(pid: int) -> float:
    """When a process was started, in seconds since the epoch; 0.0 if it is gone already."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def lives(pid: int, since: float) -> bool:
    """Whether process `pid`, started at `since`, still runs; ids are used again, times are not."""
    if pid < 1 or not process_alive(pid, since):
        return False
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def members(config: Path) -> list[psutil.Process]:
    """Every living process that was started with these settings, whoever is its parent now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if str(config) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def send(processes: Sequence[psutil.Process], signum: int) -> None:
    """Signal processes; those that are gone by now are left out."""
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(signum)


def ask_to_end(trainer: int | None, config: Path) -> None:
    """Ask a run to save its state and end.

    The trainer alone is asked, with SIGINT: its launcher would leave it behind. A run that has no
    trainer yet is asked by SIGTERM, launcher and all.

    Args:
        trainer: Process id of its trainer as status.json names it, None before it wrote that.
        config: Its settings.
    """
    found = members(config)
    named = [process for process in found if process.pid == trainer]
    if named:
        send(named, signal.SIGINT)
    else:
        send(found, signal.SIGTERM)


def end(config: Path, grace: float, ask: bool = False) -> None:
    """Return when no process of a run is left: after `grace` seconds they are ended, then killed.

    Args:
        config: Settings of the run.
        grace: Seconds to wait before SIGTERM.
        ask: Send SIGTERM at once too; a trainer that is saving because of it goes on saving.
    """
    if ask:
        send(members(config), signal.SIGTERM)
    for seconds, signum in ((grace, signal.SIGTERM), (LAST_GRACE, signal.SIGKILL)):
        if _gone_within(config, seconds):
            return
        send(members(config), signum)
    _gone_within(config, LAST_GRACE)


def _gone_within(config: Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while found := members(config):
        while any(_runs(process) for process in found):
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK)
    return True


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_leader(child: "subprocess.Popen[bytes] | None", pid: int, since: float) -> int | None:
    """Wait until a launcher ended and return its exit code; None if another server started it.

    A child of ours is collected here: no zombie is left of it.
    """
    if child is not None:
        return child.wait()
    while lives(pid, since):
        time.sleep(_LOOK)
    return None
