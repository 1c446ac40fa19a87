"""The trainer is killed, then the server; a new server shows the run and resumes it exactly."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from snell_diffusion.app import jobs as jobs_module
from snell_diffusion.app.job_record import read_json
from snell_diffusion.app.processes import members
from snell_diffusion.app.workspace import Workspaces
from tests.app import tiny_runs

pytestmark = pytest.mark.row("G9")

ROOT = jobs_module.SCRIPT.parent
SERVER = """
import json, sys
from pathlib import Path
from snell_diffusion import app
from snell_diffusion.app.options import Options
options = Options(runs=Path(sys.argv[1]))
made = app.make_app(options)
jobs = made.workspaces.of(None).jobs
job = jobs.new()
jobs.start(job, json.loads(sys.argv[2]), "a cat")
print(job, flush=True)
app.launch(app.make_page(made), options)
"""


@pytest.fixture(scope="module")
def values(tiny_base, tmp_path_factory):
    """Settings of a run that is long enough to be hit."""
    photos = tmp_path_factory.mktemp("photos")
    return tiny_runs.settings(tiny_base, photos, max_train_steps=60, validation_steps=20)


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """Digest of the adapter of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run")}))
    command = tiny_runs.without_launcher(jobs_module.SCRIPT, config)
    subprocess.run(command, check=True, capture_output=True)
    return tiny_runs.adapter_digest(folder / "run")


class Observed:
    """The files of a run that another process is writing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"

    def state(self) -> str:
        return read_json(self.run / "status.json").get("state", "")

    def saved(self) -> list[Path]:
        return list((self.run / "checkpoints").glob("step-*"))

    def trainer(self) -> psutil.Process | None:
        """The process below the launcher."""
        found = members(self.folder / "settings.yaml")
        ids = {process.pid for process in found}
        return next((process for process in found if process.ppid() in ids), None)


def steps(run: Observed) -> int:
    log = run.run / "log.jsonl"
    return log.read_text().count('"event": "step"') if log.is_file() else 0


MOMENTS = {
    "while it loads": lambda run: run.trainer() and not run.state(),
    "after a saved state": lambda run: run.saved() and steps(run) > 10,
    "before the first saved state": lambda run: steps(run) > 0 and not run.saved(),
    "while it draws": lambda run: run.state() == "sampling",
    "while it saves its state": lambda run: list((run.run / "checkpoints").glob(".tmp-*")),
    "while it finishes": lambda run: run.state() == "saving",
}
FULL = list(MOMENTS)[2:]


def moments():
    return [
        pytest.param(name, marks=pytest.mark.full if name in FULL else (), id=name)
        for name in MOMENTS
    ]


@pytest.fixture
def server(values, tmp_path):
    """(process of a server, runs of its owner, run) with the run just started."""
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tmp_path / "runs"), json.dumps(values)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    job = process.stdout.readline().decode().strip()
    assert job, (tmp_path / "server.log").read_text()
    yield process, tmp_path / "runs", job
    process.kill()
    process.wait()
    process.stdout.close()
    for left in members(tmp_path / "runs" / "local" / "runs" / job / "settings.yaml"):
        left.kill()


@pytest.mark.parametrize("moment", moments())
def test_after_every_kill_the_run_ends_in_the_same_file(server, whole, moment):
    process, root, job = server
    run = Observed(root / "local" / "runs" / job)
    tiny_runs.wait_for(lambda: MOMENTS[moment](run), pause=0.0005)
    trainer = run.trainer()
    assert trainer is not None, "the run ended before it could be killed"
    trainer.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()

    jobs = Workspaces(root).of(None).jobs  # what a new server works on
    status = tiny_runs.ended(jobs, job)
    assert status.state == "failed", status
    assert status.message.startswith("The system ended the run")
    assert status.resumable == bool(run.saved())
    assert jobs.active() is None
    jobs.resume(job)
    assert tiny_runs.ended(jobs, job).state == "finished", (run.folder / "train.log").read_text()
    assert tiny_runs.adapter_digest(run.run) == whole
    logged = [event["step"] for event in jobs.events(job) if event["event"] == "step"]
    assert logged == list(range(1, 61))


@pytest.mark.full
def test_a_server_that_is_killed_alone_leaves_the_run_going(server, whole):
    process, root, job = server
    process.kill()
    process.wait()
    jobs = Workspaces(root).of(None).jobs
    assert jobs.active() == job
    assert tiny_runs.ended(jobs, job).state == "finished"
    assert tiny_runs.adapter_digest(jobs.folder(job) / "run") == whole
