"""Ctrl-C and SIGTERM: the state is saved, the script exits 130 or 143, a resume is exact."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from snell_diffusion.diffusion.config_files import config_text
from snell_diffusion.training import checkpoints
from snell_diffusion.training.tracking import Tracker
from tests.reliability import harness
from tests.reliability.harness import (
    logged_steps,
    published,
    require_same_result,
    resumed,
    small_run,
    wait_until,
)

pytestmark = pytest.mark.row("R3")

AT = 2  # the step at which the signal comes


def at_step(signum: int) -> Callable[[], None]:
    """An installer: the process gets the signal while step `AT` is being recorded."""

    def install() -> None:
        record = Tracker.step

        def step(self: Tracker, step: int, **numbers: object) -> None:
            record(self, step, **numbers)
            if step == AT:
                os.kill(os.getpid(), signum)

        Tracker.step = step  # type: ignore[method-assign]

    return install


def during_save() -> None:
    """The process gets SIGTERM when half of the files of the checkpoint of `AT` are written."""
    write = checkpoints._write

    def signalled(path: Path, data: bytes) -> tuple[int, str]:
        if path.name == "optimizer.safetensors" and path.parent.name.endswith(f"step-{AT:06d}"):
            os.kill(os.getpid(), signal.SIGTERM)
        return write(path, data)

    checkpoints._write = signalled


def twice() -> None:
    """SIGTERM after step `AT`, and again while the state is being saved because of the first."""
    at_step(signal.SIGTERM)()
    during_save()


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    return harness.adapter_digest(harness.train_to_the_end(small_run(tiny_base, folder)))


@pytest.mark.parametrize(
    "install, code, every",
    [
        (at_step(signal.SIGTERM), 143, None),
        (at_step(signal.SIGINT), 130, None),
        (twice, 143, None),
        (during_save, 143, 1),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM twice", "SIGTERM during a save"],
)
def test_signal(
    tiny_base: Path,
    tmp_path: Path,
    whole: str,
    install: Callable[[], None],
    code: int,
    every: int | None,
) -> None:
    settings = small_run(tiny_base, tmp_path, checkpointing_steps=every)
    outcome = harness.run_script(settings, install)
    assert outcome.code == code, outcome.said[-3000:]
    assert f"stopped after step {AT}, the state is in " in outcome.said
    assert "Traceback" not in outcome.said
    assert published(tmp_path / "run") == [AT]
    harness.assert_finished(harness.run_script(resumed(settings)))
    require_same_result(settings, whole)


def test_a_launcher_that_ends_without_a_word(
    tiny_base: Path, tmp_path: Path, repo_root: Path
) -> None:
    """`accelerate launch` of one process dies of SIGTERM and does not pass it on."""
    settings = small_run(tiny_base, tmp_path, checkpointing_steps=None, max_train_steps=2000)
    arguments, run = tmp_path / "run.yaml", tmp_path / "run"
    arguments.write_text(config_text(settings), "utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launcher = subprocess.Popen(
        [*command, "train_dreambooth_snella.py", "--config", str(arguments)],
        cwd=repo_root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: (run / "log.jsonl").is_file(), "the run has begun", 120)
        wait_until(lambda: bool(logged_steps(run)), "the first step", 120)
        launcher.terminate()
        assert launcher.wait(30) == -signal.SIGTERM
        wait_until(lambda: status(run)["state"] == "stopped", "the trainer has ended", 60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert published(run) == logged_steps(run)[-1:]
    assert published(run)[0] < 2000


def status(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "status.json").read_text("utf-8")))
