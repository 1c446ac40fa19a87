"""Expected time and memory: from earlier runs, else from this machine's speed."""

import json
import time

import pytest
import yaml

from snell_diffusion.app import estimates
from snell_diffusion.app.bases import Bases
from snell_diffusion.app.estimates import REFERENCE, Estimate, duration, estimate, speed_here
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.presets import preset_values

BASES = Bases.of()
EMBEDDED = BASES.get("embedded")
GIB = 2**30


@pytest.fixture
def jobs(tmp_path):
    return Jobs(tmp_path / "runs", tmp_path / "train.py")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of the reference's speed, with nothing to do."""
    monkeypatch.setattr(estimates, "slowdown", lambda: 1.0)
    monkeypatch.setattr(estimates.torch.cuda, "is_available", lambda: False)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"passes_per_second": REFERENCE["embedded"].speed}))
    return path


def settings(effort="quick", **more):
    values = {"pretrained_model_name_or_path": "embedded"}
    return {**values, **preset_values(EMBEDDED, "object", effort, 5), **more}


def finished_run(jobs, state="finished", steps=45, each=1.0, around=20.0, memory=GIB, **more):
    """A run on the disk that took `each` seconds a step and `around` seconds besides."""
    job = jobs.new()
    folder = jobs.folder(job)
    (folder / "run").mkdir()
    spent = around + steps * each
    record = {"label": "cat", "facts": {}, "started": time.time(), "began": 0.0, "spent": spent}
    record |= {"pid": 0, "created": 0.0, "ended": 1.0, "exit": 0, "asked": None, "log_start": 0}
    (folder / "job.json").write_text(json.dumps(record))
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings(**more)))
    (folder / "run" / "status.json").write_text(
        json.dumps({"state": state, "step": steps, "total": steps})
    )
    events = [
        {"event": "step", "step": step + 1, "loss": 1.0, "seconds": each, "memory": memory}
        for step in range(steps)
    ]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return job


def test_without_runs_the_reference_is_scaled_by_this_machines_speed(jobs, machine):
    known = REFERENCE["embedded"]
    expected = estimate(jobs, EMBEDDED, settings(), machine)
    assert expected.seconds == pytest.approx(known.start + 45 * known.step + 5 * known.sheet)
    assert expected.memory == known.memory
    machine.write_text(json.dumps({"passes_per_second": known.speed / 2}))
    slower = estimate(jobs, EMBEDDED, settings(), machine)
    assert slower.seconds == pytest.approx(2 * expected.seconds)


def test_more_steps_and_more_photos_per_step_take_longer(jobs, machine):
    quick, balanced, heavy = (
        estimate(jobs, EMBEDDED, values, machine).seconds
        for values in (settings(), settings("balanced"), settings(train_batch_size=8))
    )
    assert quick < heavy < balanced * 2
    assert quick < balanced


def test_an_earlier_run_of_the_same_cost_tells_more(jobs, machine):
    finished_run(jobs, each=1.0, around=20.0, memory=3 * GIB)
    expected = estimate(jobs, EMBEDDED, settings("balanced"), machine)
    assert expected == Estimate(110.0, 3 * GIB, "from your last run with these settings")


@pytest.mark.parametrize("change", [{"rank": 4}, {"train_batch_size": 1}, {"method": "lora"}])
def test_a_run_of_another_cost_tells_nothing(jobs, machine, change):
    finished_run(jobs, **change)
    assert "machine" in estimate(jobs, EMBEDDED, settings(), machine).basis


def test_an_unfinished_run_tells_nothing(jobs, machine):
    finished_run(jobs, state="stopped")
    assert "machine" in estimate(jobs, EMBEDDED, settings(), machine).basis


def test_the_newest_run_counts(jobs, machine):
    finished_run(jobs, each=1.0)
    finished_run(jobs, each=2.0)
    assert estimate(jobs, EMBEDDED, settings(), machine).seconds == pytest.approx(110.0)


def test_a_run_with_a_broken_log_tells_nothing(jobs, machine):
    job = finished_run(jobs)
    (jobs.folder(job) / "run" / "log.jsonl").write_text('{"event": "step", "step": 1}\n')
    assert "machine" in estimate(jobs, EMBEDDED, settings(), machine).basis


def test_another_base_is_unknown_until_it_was_trained(jobs, machine, tiny_base):
    from snell_diffusion.app.bases import described

    base = described("tiny", str(tiny_base))
    values = {**settings(), "pretrained_model_name_or_path": base.source}
    expected = estimate(jobs, base, values, machine)
    assert (expected.seconds, expected.memory) == (None, None)
    assert expected.sentence() == "unknown before a first run"


def test_on_a_gpu_the_reference_says_nothing(jobs, machine, monkeypatch):
    monkeypatch.setattr(estimates.torch.cuda, "is_available", lambda: True)
    assert estimate(jobs, EMBEDDED, settings(), machine).seconds is None


def test_the_speed_is_measured_once_and_kept_with_what_was_measured(tmp_path):
    path = tmp_path / "new" / "machine.json"
    speed = speed_here(path)
    record = json.loads(path.read_text())
    assert 10 < speed < 1e6
    assert speed_here(path) == speed == record["passes_per_second"]
    assert "processor time" in record["measured"]


def test_a_busy_machine_is_slower(monkeypatch):
    monkeypatch.setattr(estimates.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(estimates.os, "getloadavg", lambda: (0.1, 0, 0))
    assert estimates.slowdown() == 1.0
    monkeypatch.setattr(estimates.os, "getloadavg", lambda: (5.3, 0, 0))
    assert estimates.slowdown() == pytest.approx(2.6, abs=0.05)


@pytest.mark.parametrize(
    "seconds, text",
    [
        *((3, "10 s"), (44, "40 s"), (58, "1 min"), (170, "3 min")),
        *((3599, "1 h 0 min"), (7900, "2 h 10 min")),
    ],
)
def test_durations_are_rounded_as_estimates(seconds, text):
    assert duration(seconds) == text


def test_the_sentence_names_time_and_memory():
    assert Estimate(170.0, 0.71 * GIB, "").sentence() == "about 3 min, 0.7 GiB"
    assert Estimate(170.0, None, "").sentence() == "about 3 min"
