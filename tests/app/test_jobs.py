"""Runs as child processes; a few lines of Python stand in for the training script."""

import signal
import sys
import time

import psutil
import pytest

from snell_diffusion.app import jobs as jobs_module
from snell_diffusion.app import processes
from snell_diffusion.app.jobs import Jobs, launch_command
from snell_diffusion.errors import SnellaError, SnellaValueError

HEAD = """
import json, os, pathlib, signal, sys, time, yaml
settings = yaml.safe_load(pathlib.Path(sys.argv[2]).read_text())
run = pathlib.Path(settings["output_dir"]); run.mkdir(exist_ok=True)
def status(state, step, **more):
    values = {"state": state, "step": step, "total": 4, "pid": os.getpid(), **more}
    values["updated"] = time.time()
    (run / "status.tmp").write_text(json.dumps(values))
    (run / "status.tmp").rename(run / "status.json")
"""
SUCCEEDS = HEAD + "status('finished', 4); (run / 'pytorch_snella_weights.safetensors').touch()"
CRASHES = HEAD + "status('running', 2, eta_s=5.0); sys.exit('OddError: the paint is wet')"
WAITS = HEAD + "status('running', 1, eta_s=61.5); time.sleep(60)"
SAVES_ON_SIGINT = (
    HEAD
    + """
def end(*_):
    status('stopped', 3); sys.exit(130)
signal.signal(signal.SIGINT, end); status('running', 3); time.sleep(60)
"""
)
IGNORES_SIGNALS = (
    HEAD
    + """
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
status('running', 1); time.sleep(60)
"""
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(source) -> Jobs whose training script is `source`, without accelerate in between."""
    made = []

    def command(script, config, resume=False):
        return [sys.executable, str(script), "--config", str(config)]

    def jobs(source):
        script = tmp_path / "train.py"
        script.write_text(source)
        made.append(Jobs(tmp_path / "runs", script))
        return made[-1]

    monkeypatch.setattr(jobs_module, "launch_command", command)
    yield jobs
    for each in made:
        for job in each.all():
            processes.send(processes.members(each.folder(job) / "settings.yaml"), signal.SIGKILL)
            wait_for(lambda job=job, each=each: not each.alive(job))


def start(jobs):
    job = jobs.new()
    jobs.start(job, {"seed": 0}, "cat")
    return job


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_finished_run_has_an_adapter(make):
    jobs = make(SUCCEEDS)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).state == "finished")
    assert jobs.status(job).step == jobs.status(job).total == 4
    assert jobs.adapter(job).name == "pytorch_snella_weights.safetensors"
    assert jobs.active() is None


def test_a_crash_is_a_failed_run_that_quotes_the_last_line(make):
    jobs = make(CRASHES)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).state == "failed")
    assert jobs.status(job).message.endswith("OddError: the paint is wet")
    with pytest.raises(SnellaValueError, match="no adapter yet"):
        jobs.adapter(job)


def test_stop_lets_the_run_save_its_state(make):
    jobs = make(SAVES_ON_SIGINT)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 3)
    jobs.stop(job)
    wait_for(lambda: jobs.status(job).state == "stopped")


def test_a_run_that_does_not_stop_is_killed_after_the_grace_period(make, monkeypatch):
    monkeypatch.setattr(jobs_module, "GRACE", 0.3)
    jobs = make(IGNORES_SIGNALS)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 1)
    jobs.stop(job)
    wait_for(lambda: not jobs.alive(job))
    status = jobs.status(job)
    assert (status.state, status.resumable) == ("stopped", False)
    assert status.message.startswith("It was ended before it could save")


def test_only_one_run_trains_at_a_time(make):
    jobs = make(WAITS)
    first = start(jobs)
    assert jobs.active() == first
    with pytest.raises(SnellaValueError, match="a run is going already"):
        start(jobs)


def test_a_restarted_server_finds_the_run_and_can_stop_it(make, tmp_path):
    jobs = make(SAVES_ON_SIGINT)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 3)
    second = Jobs(jobs.root, jobs.script)
    assert second.all() == [job]
    assert second.status(job).state == "running"
    second.stop(job)
    wait_for(lambda: not second.alive(job))
    assert second.status(job).state == jobs.status(job).state == "stopped"


def test_a_process_id_that_was_given_away_is_not_the_run(make, tmp_path):
    jobs = make(CRASHES)
    job = start(jobs)
    wait_for(lambda: not jobs.alive(job))
    record = jobs.root / job / "job.json"
    record.write_text(
        record.read_text().replace(str(jobs.info(job)["pid"]), str(psutil.Process().pid))
    )
    assert Jobs(jobs.root, jobs.script).status(job).state == "failed"


@pytest.mark.parametrize("job", ["", "../other", "0" * 31, "G" * 32, "0" * 32 + "/..", None, 7])
def test_only_ids_name_runs(make, job):
    with pytest.raises(SnellaValueError, match="not the id of one"):
        make(WAITS).folder(job)


def test_an_unknown_id_is_refused(make):
    with pytest.raises(SnellaValueError, match="no longer there"):
        make(WAITS).folder("0" * 32)


def test_a_missing_script_is_an_error_before_anything_starts(tmp_path):
    jobs = Jobs(tmp_path, tmp_path / "train_dreambooth_snella.py")
    with pytest.raises(SnellaError, match="needs a checkout of the project"):
        jobs.start(jobs.new(), {}, "cat")
    assert jobs.all() == []


def test_the_command_is_an_argument_list(tmp_path):
    command = launch_command(tmp_path / "train; rm.py", tmp_path / "a b.yaml")
    assert command[-3:] == [str(tmp_path / "train; rm.py"), "--config", str(tmp_path / "a b.yaml")]
