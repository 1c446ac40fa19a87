"""Checkpoints of a run that goes on, and what is said of one that failed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from snell_diffusion.training.adapter_tensors import trainable_parameters
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import CheckpointError, NonFiniteError
from snell_diffusion.training.keeping import StateKeeper
from snell_diffusion.training.loop import TrainState
from snell_diffusion.training.parallel import Replicated
from snell_diffusion.training.tracking import Tracker
from tests.training.models import adapted

ABOUT = {"identity": {"seed": 3}, "class_images": None}


@pytest.fixture
def parts(tmp_path: Path) -> tuple[StateKeeper, TrainState, CheckpointFolder, Tracker]:
    components: dict[str, nn.Module] = adapted("lora")
    parameters = list(trainable_parameters(components).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    state = TrainState(components=components, optimizer=optimizer, scheduler=scheduler)
    folder = CheckpointFolder(tmp_path / "checkpoints", 2)
    parallel = Replicated(Accelerator(cpu=True))
    keeper = StateKeeper(state, folder, parallel, lambda: ABOUT, "checkpointing_days")
    return keeper, state, folder, Tracker(None, 9, quiet=True)


def spoil(state: TrainState) -> None:
    with torch.no_grad():
        state.parameters[0].fill_(torch.nan)


def test_a_state_is_published_with_whose_it_is(parts: Any) -> None:
    keeper, state, folder, tracker = parts
    state.step = 4
    path = keeper.save(tracker)
    assert path == folder.path(4)
    assert {k: folder.load(path).state[k] for k in ABOUT} == ABOUT
    assert tracker.history == [{"event": "checkpoint", "step": 4}]


def test_a_state_that_is_not_finite_is_not_published(parts: Any) -> None:
    keeper, state, folder, tracker = parts
    spoil(state)
    with pytest.raises(NonFiniteError):
        keeper.save(tracker)
    assert folder.steps() == []


def test_what_is_kept_of_a_failed_run(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before the step, saved now or already; else the last one; else nothing."""
    keeper, state, folder, tracker = parts
    state.step = 5
    assert keeper.keep_last_good(tracker) == f"The last good state is kept in {folder.path(5)}"
    spoil(state)  # by now the state is another one, but that of step 5 is there
    assert keeper.keep_last_good(tracker) == f"The last good state is kept in {folder.path(5)}"
    state.step = 6
    assert keeper.keep_last_good(tracker) == f"The last good state is kept in {folder.path(5)}"
    monkeypatch.setattr(folder, "steps", list)
    said = keeper.keep_last_good(tracker)
    assert said == "No earlier state was saved; set checkpointing_days to keep one"


def test_a_full_disk_is_told(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, _, folder, tracker = parts

    def refuse(*given: Any) -> None:
        raise CheckpointError("disk full")

    monkeypatch.setattr(folder, "save", refuse)
    said = keeper.keep_last_good(tracker)
    assert said == "The last good state could not be saved: disk full"
