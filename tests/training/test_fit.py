"""A checkpoint that verifies but does not fit is refused before anything is changed."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_diffusion.training.checkpoints import Checkpoint, Tensors
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.loop import TrainState
from tests.training.models import adapted
from tests.training.test_loop import go, loss_of, state_of

pytestmark = pytest.mark.row("R4")


def packed(state: TrainState) -> tuple[Tensors, dict[str, Any]]:
    """A copy of all a checkpoint holds, as it comes back from disk."""
    tensors, plain = state.pack()
    copied = {g: {k: v.detach().clone() for k, v in t.items()} for g, t in tensors.items()}
    return copied, json.loads(json.dumps(plain))


@pytest.fixture(scope="module")
def saved() -> tuple[Tensors, dict[str, Any]]:
    components = adapted()
    state = state_of(components)
    go(state, loss_of(components), 4)
    return packed(state)


def first(tensors: dict[str, Tensor], ending: str = "") -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def drop(group: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, state: dict[str, Any]) -> None:
        del tensors[group]

    return change


def rename(group: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, state: dict[str, Any]) -> None:
        name = first(tensors[group])
        tensors[group]["other"] = tensors[group].pop(name)

    return change


def replaced(
    group: str, ending: str, make: Callable[[Tensor], Tensor]
) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, state: dict[str, Any]) -> None:
        name = first(tensors[group], ending)
        tensors[group][name] = make(tensors[group][name])

    return change


def put(*path: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    """Set a value in state.json: keys, then the value."""

    def change(tensors: Tensors, state: dict[str, Any]) -> None:
        *keys, last, value = path
        place: Any = state
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def without(*path: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, state: dict[str, Any]) -> None:
        *keys, last = path
        place: Any = state
        for key in keys:
            place = place[key]
        del place[last]

    return change


def wider(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], -1)


CHANGES = {
    "no optimizer tensors": (drop("optimizer"), r"groups of tensors: missing \['optimizer'\]"),
    "no average": (drop("ema"), r"groups of tensors: missing \['ema'\]"),
    "adapter name": (rename("adapter"), r"adapter: missing .* not known here \['other'\]"),
    "adapter shape": (
        replaced("adapter", "snella_A.default", wider),
        "adapter tensor .*: expected",
    ),
    "adapter dtype": (replaced("adapter", "", Tensor.half), "adapter tensor .*: expected .* got"),
    "average shape": (replaced("ema", "snella_B.default", wider), "ema tensor .*: expected"),
    "moment shape": (replaced("optimizer", "0.exp_avg", wider), "optimizer tensor 0.exp_avg: exp"),
    "moment NaN": (
        replaced("optimizer", "exp_avg_sq", lambda t: t * torch.nan),
        "holds NaN or inf",
    ),
    "moment name": (rename("optimizer"), r"optimizer tensor other: expected <parameter 0 to "),
    "score shape": (replaced("competition", "first", wider), "saved statistic .*: expected shape"),
    "score name": (rename("competition"), "saved statistic other: expected shape None"),
    "score text": (put("competition", "score.net.first", "x"), "expected a number, got 'x'"),
    "other layers": (put("competition", "size.net.first", 7), "the saved allocator has metric"),
    "budget gone": (without("competition", "keep.net.first"), r"competition: missing \['keep.net"),
    "no scheduler": (without("scheduler"), "state.json has no 'scheduler'"),
    "epoch text": (put("scheduler", "last_epoch", "4"), "last_epoch: expected int, got '4'"),
    "epoch truth": (put("scheduler", "last_epoch", True), "last_epoch: expected int, got True"),
    "rate text": (put("optimizer", "groups", 0, "lr", "0.1"), r"groups\[0\].lr: expected float"),
    "betas short": (put("optimizer", "groups", 0, "betas", [0.9]), "betas: expected a list of 2"),
    "groups gone": (put("optimizer", "groups", []), "groups: expected a list of 1, got"),
    "swapped moments": (
        lambda tensors, state: state["optimizer"]["groups"][0]["params"].reverse(),
        "groups params: expected ",
    ),
    "stray state": (put("optimizer", "state", "99", {}), "state 99: expected a table of one of"),
    "state list": (put("optimizer", "state", "0", []), "state 0: expected a table of one of the"),
    "optimizer text": (put("optimizer", "adam"), "optimizer: expected a table, got 'adam'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_misfit_changes_nothing(saved: tuple[Tensors, dict[str, Any]], name: str) -> None:
    change, said = CHANGES[name]
    tensors, plain = deepcopy(saved)
    change(tensors, plain)
    state = state_of(adapted())
    before = packed(state)
    with pytest.raises(CheckpointError, match=said):
        state.restore(Checkpoint(Path("step-000004"), 4, tensors, plain))
    after = packed(state)
    assert after[1] == before[1]
    for group, values in before[0].items():
        assert values.keys() == after[0][group].keys()
        for key, tensor in values.items():
            assert torch.equal(tensor.nan_to_num(), after[0][group][key].nan_to_num()), key


def test_the_unchanged_one_fits(saved: tuple[Tensors, dict[str, Any]]) -> None:
    state = state_of(adapted())
    state.restore(Checkpoint(Path("step-000004"), 4, *deepcopy(saved)))
    assert packed(state)[1] == saved[1]
