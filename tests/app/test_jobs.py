"""Runs as child processes; a few lines of Python stand in for the training script."""

import signal
import sys
import time

import psutil
import pytest

from snell_diffusion.app import jobs as jobs_module
from snell_diffusion.app import processes
from snell_diffusion.app.jobs import Jobs, launch_command
from snell_diffusion.app.reasons import reason, without_places
from snell_diffusion.app.workspace import Workspaces
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
    (run / "checkpoints" / "step-000003").mkdir(parents=True, exist_ok=True)
    (run / "pytorch_snella_weights.safetensors").touch()
    status('stopped', 3); sys.exit(130)
signal.signal(signal.SIGINT, end)
if "--resume_from_checkpoint" in sys.argv: time.sleep(0.5); status('finished', 4); sys.exit()
status('running', 3); time.sleep(60)
"""
)
LEAVES_ITS_TRAINER = (
    HEAD
    + """
if "trainer" not in sys.argv:
    import subprocess
    sys.exit(subprocess.call([sys.executable, *sys.argv, "trainer"]))
status('running', 1); time.sleep(60)
"""
)
LITTERS = (
    HEAD
    + """
status('running', 1)
gone = 4_000_000
for folder in (run, run / "samples", run / "checkpoints"):
    folder.mkdir(exist_ok=True)
    (folder / f".tmp-{gone}-half").write_bytes(bytes(1000))
(run / "checkpoints" / f".tmp-{gone}-replaced-step-000002").mkdir()
sys.exit("OSError: [Errno 28] No space left on device")
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
        more = ["--resume_from_checkpoint", "auto"] if resume else []
        return [sys.executable, str(script), "--config", str(config), *more]

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


def ended(jobs, job):
    wait_for(lambda: not jobs.alive(job))
    return jobs.status(job)


def test_a_paused_run_hands_out_no_adapter_until_it_is_stopped(make):
    jobs = make(SAVES_ON_SIGINT)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 3)
    jobs.pause(job)
    assert jobs.status(job).state in ("pausing", "paused")
    status = ended(jobs, job)
    assert (status.state, status.resumable) == ("paused", True)
    with pytest.raises(SnellaValueError, match="no adapter yet"):
        jobs.adapter(job)
    jobs.stop(job)
    assert jobs.status(job).state == "stopped"
    assert jobs.has_adapter(job)


def test_a_stopped_run_is_resumed_in_its_folder_and_its_time_adds_up(make):
    jobs = make(SAVES_ON_SIGINT)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 3)
    jobs.stop(job)
    assert ended(jobs, job).state == "stopped"
    first = jobs.seconds(job)
    jobs.resume(job)
    assert jobs.status(job).state == "starting"  # and not what the earlier part left
    assert not jobs.has_adapter(job)
    status = ended(jobs, job)
    assert (status.state, status.resumable) == ("finished", False)
    assert jobs.seconds(job) > first > 0
    with pytest.raises(SnellaValueError, match="this run is finished"):
        jobs.resume(job)


def test_a_run_that_is_going_is_neither_resumed_nor_deleted(make):
    jobs = make(WAITS)
    job = start(jobs)
    with pytest.raises(SnellaValueError, match="going already"):
        jobs.resume(job)
    with pytest.raises(SnellaValueError, match="stop it first"):
        jobs.delete(job)
    assert jobs.all() == [job]


def test_a_failed_run_without_a_saved_state_starts_again(make):
    jobs = make(CRASHES)
    job = start(jobs)
    status = ended(jobs, job)
    assert (status.state, status.resumable) == ("failed", False)
    jobs.resume(job)
    assert ended(jobs, job).message == "OddError: the paint is wet"
    assert (jobs.folder(job) / "train.log").read_text().count("OddError") == 2


def test_pausing_twice_and_then_stopping_asks_the_trainer_once(make):
    asked = "def end(*_):\n    print('asked', flush=True); time.sleep(0.5)"
    counts = SAVES_ON_SIGINT.replace("def end(*_):", asked)
    jobs = make(counts)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 3)
    for act in (jobs.pause, jobs.pause, jobs.stop):
        act(job)
    assert ended(jobs, job).state == "stopped"
    assert (jobs.folder(job) / "train.log").read_text().count("asked") == 1


def test_a_run_asked_before_its_trainer_is_up_ends_too(make):
    jobs = make("import time; time.sleep(60)")
    job = start(jobs)
    jobs.pause(job)
    status = ended(jobs, job)
    assert (status.state, status.resumable) == ("paused", False)


def test_no_process_is_left_when_the_launcher_alone_is_killed(make):
    jobs = make(LEAVES_ITS_TRAINER)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 1)
    assert len(processes.members(jobs.folder(job) / "settings.yaml")) == 2
    psutil.Process(jobs.info(job)["pid"]).kill()
    assert ended(jobs, job).state == "failed"
    assert processes.members(jobs.folder(job) / "settings.yaml") == []
    assert not [child for child in psutil.Process().children() if child.status() == "zombie"]


def test_a_server_that_died_before_it_noted_the_process_finds_it(make):
    jobs = make(SAVES_ON_SIGINT)
    job = start(jobs)
    wait_for(lambda: jobs.status(job).step == 3)
    record = jobs.folder(job) / "job.json"
    record.write_text(record.read_text().replace(str(jobs.info(job)["pid"]), "0"))
    second = Jobs(jobs.root, jobs.script)
    assert second.active() == job
    second.stop(job)
    assert ended(second, job).state == "stopped"


def test_what_a_failed_run_left_unfinished_is_removed(make):
    jobs = make(LITTERS)
    job = start(jobs)
    assert ended(jobs, job).message.startswith("The disk is full.")
    left = [path.name for path in (jobs.folder(job) / "run").rglob("*") if ".tmp" in path.name]
    assert left == []
    # A checkpoint that was being replaced is put back, not thrown away.
    assert [state.step for state in jobs.checkpoints(job)] == [2]
    assert jobs.status(job).resumable


def test_a_deleted_run_is_gone_at_once_and_for_good(make):
    jobs = make(SUCCEEDS)
    job = start(jobs)
    ended(jobs, job)
    jobs.delete(job)
    assert (jobs.all(), list(jobs.root.iterdir())) == ([], [])
    with pytest.raises(SnellaValueError, match="no longer there"):
        jobs.delete(job)


def test_a_half_deleted_run_is_not_listed_and_is_cleared(make):
    jobs = make(SUCCEEDS)
    job = start(jobs)
    ended(jobs, job)
    jobs.folder(job).rename(jobs.root / f".deleted-{job}")
    assert jobs.all() == []
    Jobs(jobs.root, jobs.script)
    assert list(jobs.root.iterdir()) == []


def test_the_state_is_saved_about_ten_times_unless_the_settings_say_otherwise(make):
    jobs = make(SUCCEEDS)
    job = jobs.new()
    jobs.start(job, {"max_train_steps": 205}, "cat", {"subject": "cat"})
    ended(jobs, job)
    settings = jobs.settings(job)
    assert (settings["checkpointing_steps"], settings["checkpoints_total_limit"]) == (20, 2)
    assert jobs.info(job)["facts"] == {"subject": "cat", "method": "snella"}
    other = jobs.new()
    jobs.start(other, {"max_train_steps": 205, "checkpointing_steps": 7}, "cat")
    ended(jobs, other)
    assert jobs.settings(other)["checkpointing_steps"] == 7
    assert jobs.all() == [other, job]


def test_sample_sheets_come_in_the_order_of_their_steps(make):
    jobs = make(SUCCEEDS)
    job = start(jobs)
    ended(jobs, job)
    folder = jobs.folder(job) / "run" / "samples"
    folder.mkdir()
    for name in (
        "step-000010.png",
        "step-1000000.png",
        "step-000000.png",
        ".tmp-1-step-000020.png",
    ):
        (folder / name).touch()
    assert [step for step, _ in jobs.samples(job)] == [0, 10, 1000000]


def test_one_run_at_a_time_among_all_users_also_after_a_restart(make, tmp_path):
    jobs = make(WAITS)
    users = Workspaces(tmp_path / "users", jobs.script)
    job = start(users.of("ann").jobs)
    try:
        with pytest.raises(SnellaValueError, match="a run is going already"):
            start(users.of("bob").jobs)
        again = Workspaces(tmp_path / "users", jobs.script)
        assert again.training()[1] == job
        with pytest.raises(SnellaValueError, match="a run is going already"):
            start(again.of(None).jobs)
        assert again.of("bob").jobs.active() is None
    finally:
        users.of("ann").jobs.stop(job)
    ended(users.of("ann").jobs, job)
    assert users.training() is None


# -- why a run failed -----------------------------------------------------------------------------

DIED = "subprocess.CalledProcessError: Command '[...]' died with <Signals.SIGKILL: 9>."
FALLBACK = "RuntimeError: operator torchvision::nms does not exist"


@pytest.mark.parametrize(
    "message, printed, code, said",
    [
        ("", f"{FALLBACK}\nMemoryError\n{DIED}", 1, "The system ended the run"),
        ("", FALLBACK, -9, "The system ended the run"),
        ("", "numpy: Unable to allocate 3 GiB", 1, "The computer ran out of memory."),
        ("", "terminate called after throwing 'std::bad_alloc'", -6, "The computer ran out of"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "", 1, "The graphics card ran out"),
        ("checkpoint /a/b c could not be written: No space left on device; x", "", 1, "The disk"),
        ("loss is NaN after step 3", f"{FALLBACK}\n", 1, "loss is NaN after step 3"),
        ("", f"{FALLBACK}\nSnellaBaseError: no base\n{DIED[:40]}", 1, "SnellaBaseError: no base"),
        ("", "train: 10%|#\rValueError: odd\n", 1, "ValueError: odd"),
        ("", "", None, "It ended without saying why."),
    ],
)
def test_a_failure_says_its_real_reason(message, printed, code, said):
    assert reason(message, printed, code).startswith(said)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("photo /srv/app/runs/ab/photos/photo-00.png is bad", "photo photo-00.png is bad"),
        ("folder '/srv/app/runs': no", "folder 'runs': no"),
        (
            "see https://example.org/a/b/c and 3/4 of it",
            "see https://example.org/a/b/c and 3/4 of it",
        ),
        ("~/secret/key and ../up/file", "key and file"),
    ],
)
def test_no_folder_of_the_server_is_told(text, shown):
    assert without_places(text) == shown
