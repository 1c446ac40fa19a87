"""How a run begins: the tracker's package, the folder's first files, the checkpoint it needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.run_folder import RunFolder
from snell_diffusion.training.start import find_checkpoint, open_run, require_tracker
from snell_diffusion.training.tracking import Tracker

VALUES = {"report_to": "none", "rank": 4, "prompts": ["a cup"]}


class Trackers:
    """Stands in for accelerate's trackers."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.logged: list[Any] = []

    def init_trackers(self, project: str, config: dict[str, Any]) -> None:
        self.begun.append((project, config))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((numbers, step))


class Process:
    """Stands in for one of several processes; notes where it waits."""

    def __init__(self, main: bool = True) -> None:
        self.main, self.accelerator, self.waits = main, Trackers(), 0

    def wait(self) -> None:
        self.waits += 1


def folder(path: Path, resume: str | None = None) -> RunFolder:
    names = ("config.yaml", "log.jsonl", "status.json"), ("checkpoints", "logs")
    return RunFolder(path, *names, overwrite=False, resume=resume, limit=1)


def opened(path: Path | None, process: Process, **changes: Any) -> Tracker:
    values = {**VALUES, **changes.pop("values", {})}
    given = {"steps": 9, "resumed": None, "notes": ["careful"], "on_event": None, **changes}
    where = None if path is None else folder(path)
    tracker = open_run("cups", values, where, process, quiet=True, **given)  # type: ignore[arg-type]
    tracker.close()
    return tracker


def test_a_new_run_writes_settings_status_and_notes(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n')
    process = Process()
    tracker = opened(tmp_path, process)
    assert tracker.history == [{"event": "note", "message": "careful"}]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == tracker.history[0]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == VALUES
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["total"]) == ("preparing", 0, 9)
    assert process.waits == 1
    assert process.accelerator.begun == []


def test_a_resumed_run_keeps_the_log_up_to_its_step(tmp_path: Path) -> None:
    lines = [json.dumps({"event": "step", "step": step}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    opened(tmp_path, Process(), resumed=2, notes=[])
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:2]
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 2


def test_other_processes_and_runs_without_folder_write_nothing(tmp_path: Path) -> None:
    process = Process(main=False)
    assert opened(tmp_path / "run", process).history == []
    assert process.waits == 1
    assert len(opened(None, Process()).history) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_gets_plain_settings_and_every_number(tmp_path: Path) -> None:
    process = Process()
    tracker = opened(tmp_path, process, values={"report_to": "wandb"})
    plain = {"report_to": "wandb", "rank": 4, "prompts": "['a cup']"}
    assert process.accelerator.begun == [("cups", plain)]
    tracker.remote({"loss": 0.5}, 3)
    assert process.accelerator.logged == [({"loss": 0.5}, 3)]


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SnellaConfigError, match=r"report_to wandb needs .* pip install wandb"):
        require_tracker("wandb")
    require_tracker("none")


@pytest.mark.parametrize("main", [True, False])
def test_every_process_waits_once_also_after_an_error(main: bool, tmp_path: Path) -> None:
    process = Process(main)
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        find_checkpoint(folder(tmp_path, "latest"), process, print)  # type: ignore[arg-type]
    assert process.waits == 1
    assert find_checkpoint(None, process, print) is None  # type: ignore[arg-type]
    assert process.waits == 1
