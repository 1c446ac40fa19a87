"""Runs that stop on the held-out loss: what they keep and say, and what a resume finds."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from snell_diffusion.adapters import read_adapter
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.results import RunResult
from snell_diffusion.diffusion.training import run
from snell_diffusion.diffusion.validation import Probe
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import CheckpointError
from tests.diffusion.training_runs import adapter, config

LOSSES = (3.0, 2.0, 1.0, 1.5, 1.2, 0.5, 0.4)  # after step 0, 1, ...
STOP: dict[str, Any] = {
    "max_train_steps": 6,
    "validation_steps": 1,
    "early_stopping_patience": 2,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 9,
    "target_modules": ["to_q"],
}


@contextmanager
def measured(losses: Sequence[float]) -> Iterator[None]:
    """Measurements of the held-out loss give these numbers, one after the other."""
    numbers = iter(losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "loss", lambda self: next(numbers))
        patch.setattr(Probe, "base_loss", lambda self: 4.0)
        yield


@pytest.fixture(scope="module")
def stopped(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, RunResult]:
    """A run that stops after step 4 and keeps step 2."""
    settings = config(tiny_base, tmp_path_factory.mktemp("stop"), **STOP)
    with measured(LOSSES):
        return settings, run(settings)


def elsewhere(settings: TrainConfig, folder: Path, **changes: Any) -> TrainConfig:
    """The same run, to be continued in a copy of its folder."""
    shutil.copytree(settings.output_dir, folder / "run")
    return TrainConfig(**{**vars(settings), "output_dir": str(folder / "run"), **changes})


def test_a_run_stops_and_keeps_the_best(stopped: tuple[TrainConfig, RunResult]) -> None:
    _, result = stopped
    assert (result.step, result.kept_step, result.stopped_early) == (4, 2, True)
    assert result.validation_loss_after == 1.0
    assert [e["step"] for e in result.history if e["event"] == "step"] == [1, 2, 3, 4]
    [stop] = [e for e in result.history if e["event"] == "early stop"]
    assert (stop["step"], stop["best_step"], stop["best_loss"]) == (4, 2, 1.0)
    status = json.loads((result.output_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["kept_step"]) == ("finished", 4, 2)
    card = (result.output_dir / "README.md").read_text()
    assert "| kept | the best adapter measured, step 2; stopped early at step 4 |" in card
    assert "| steps, batch, learning rate | 4, 2, " in card
    notes = [e["message"] for e in result.history if e["event"] == "note"]
    told = "kept is the best adapter measured, step 2, held-out loss 1.0000"
    assert any(told in note for note in notes)


def test_the_kept_adapter_is_that_of_its_step(stopped: tuple[TrainConfig, RunResult]) -> None:
    _, result = stopped
    folder = CheckpointFolder(result.output_dir / "checkpoints", None)
    then = folder.load(folder.path(2)).tensors["adapter"]
    last = folder.load(folder.path(4)).tensors["adapter"]
    saved = read_adapter(result.adapter_path).tensors
    factors = [name for name in saved if name.endswith("snella_A")]
    assert read_adapter(result.adapter_path).header.metadata["steps"] == 2
    assert all(torch.equal(saved[name], then[f"{name}.default"]) for name in factors)
    assert not all(torch.equal(saved[name], last[f"{name}.default"]) for name in factors)


def test_resumed_before_the_stop_it_ends_alike(
    stopped: tuple[TrainConfig, RunResult], tmp_path: Path
) -> None:
    settings, result = stopped
    start = str(tmp_path / "run" / "checkpoints" / "step-000003")
    with measured(LOSSES[4:]):
        again = run(elsewhere(settings, tmp_path, resume_from_checkpoint=start))
    assert (again.step, again.kept_step) == (4, 2)
    assert adapter(again.output_dir) == adapter(result.output_dir)


def test_a_run_that_has_stopped_trains_no_further(
    stopped: tuple[TrainConfig, RunResult], tmp_path: Path
) -> None:
    settings, result = stopped
    with measured(()):
        again = run(elsewhere(settings, tmp_path, resume_from_checkpoint="latest"))
    assert (again.step, again.kept_step, again.stopped_early) == (4, 2, True)
    assert adapter(again.output_dir) == adapter(result.output_dir)


def test_the_best_is_kept_also_where_nothing_stops(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, **{**STOP, "max_train_steps": 3, "ema_decay": 0.5})
    with measured(LOSSES):
        result = run(settings)
    assert (result.step, result.kept_step, result.stopped_early) == (3, 2, False)
    assert "ended at step 3" in (result.output_dir / "README.md").read_text()


@pytest.mark.parametrize("changes", [{"early_stopping_patience": 3}, {"validation_steps": 2}])
def test_how_it_is_measured_may_not_change_on_a_resume(
    changes: dict[str, Any], stopped: tuple[TrainConfig, RunResult]
) -> None:
    values = {**vars(stopped[0]), **changes, "resume_from_checkpoint": "latest"}
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        run(TrainConfig(**values))


def test_it_needs_measurements(tmp_path: Path) -> None:
    given = {"instance_data_dir": str(tmp_path), "instance_prompt": "a cat"}
    with pytest.raises(ValueError, match="needs validation_steps and held-out photos"):
        TrainConfig(**given, early_stopping_patience=2, validation_steps=1)
    with pytest.raises(ValueError, match="needs validation_steps and held-out photos"):
        TrainConfig(**given, early_stopping_patience=2, num_validation_photos=1)
