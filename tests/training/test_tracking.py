"""Log, status and progress of a run."""

import json
import os
from pathlib import Path

import pytest
import torch

from snell_diffusion.training.errors import OutputError
from snell_diffusion.training.tracking import Tracker, cut_log, peak_memory, read_log

NUMBERS = {"loss": 0.5, "lr": 1e-4, "memory": 2**30, "kept_share": 0.25}


def test_log_status_and_listeners_get_the_same(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    sent: list[tuple[dict[str, float], int]] = []
    tracker = Tracker(tmp_path, 3, heard.append, lambda n, s: sent.append((n, s)))
    tracker.event("start", step=0)
    for step in (1, 2, 3):
        tracker.step(step, **NUMBERS)
    tracker.status("finished", force=True)
    tracker.close()
    assert read_log(tmp_path / "log.jsonl") == heard == tracker.history
    assert [e["step"] for e in heard] == [0, 1, 2, 3]
    assert sent[1] == (NUMBERS, 2)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "finished"
    assert (status["step"], status["total"], status["pid"]) == (3, 3, os.getpid())


def test_status_tells_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr("snell_diffusion.training.tracking.time.monotonic", lambda: next(clock))
    tracker = Tracker(tmp_path, 10)
    tracker.step(1, **NUMBERS)
    tracker.step(2, **NUMBERS)
    tracker.close()
    # the clock moves one second per call: two calls lie between the two steps
    assert json.loads((tmp_path / "status.json").read_text())["eta_s"] == 2.0 * 8


def test_bar_shows_loss_rate_share_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, 1)
    tracker.step(1, **NUMBERS)
    tracker.close()
    shown = capsys.readouterr().err
    for part in ("loss=0.5000", "lr=1.0e-04", "kept=25%", "mem=1.00G"):
        assert part in shown


def test_a_dry_run_writes_nothing_and_another_rank_says_nothing(tmp_path: Path) -> None:
    quiet = Tracker(None, 1)
    quiet.event("start")
    quiet.status("training")
    other = Tracker(tmp_path, 1, main=False)
    other.event("start")
    other.step(1, **NUMBERS)
    assert list(tmp_path.iterdir()) == []
    assert other.history == []


def test_cut_log_drops_later_steps_and_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"event": "note"}, {"event": "step", "step": 1}, {"event": "step", "step": 2}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "st')
    cut_log(path, 1)
    assert read_log(path) == lines[:2]
    cut_log(tmp_path / "absent.jsonl", 1)
    assert not (tmp_path / "absent.jsonl").exists()


def test_peak_memory_is_in_bytes() -> None:
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


def test_a_line_that_the_disk_refuses_names_the_log(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 3)
    tracker.close()
    said = r"log.jsonl could not be written: No space left on device; the disk at "
    with Path("/dev/full").open("wb", buffering=0) as full:
        tracker._log._file = full
        with pytest.raises(OutputError, match=said):
            tracker.event("start", step=0)


def test_a_line_is_written_whole_by_a_disk_that_takes_parts(tmp_path: Path) -> None:
    class Slow:
        def write(self, data: memoryview) -> int:
            return file.write(data[:7])

        def close(self) -> None:
            file.close()

    tracker = Tracker(tmp_path, 3)
    file = tracker._log._file
    tracker._log._file = Slow()
    tracker.event("note", message="x" * 100)
    tracker.close()
    assert read_log(tmp_path / "log.jsonl") == tracker.history


def test_why_a_run_ended_is_not_hidden_by_a_full_disk(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 3)
    tracker.folder = Path("/proc/nowhere")
    tracker.ended(OutputError("the first one"), "failed")
    with pytest.raises(OutputError, match=r"/proc/nowhere/status\.json could not be written"):
        tracker.status("failed", force=True)
    tracker.close()


def test_cut_log_drops_what_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = b'{"event": "step", "step": 1}\n'
    path.write_bytes(good + b'\xff\xfe\n7\n{"event": "st\n' + good.replace(b"1", b"9"))
    cut_log(path, 3)
    assert path.read_bytes() == good
