"""Checks that a value is finite: what they find, what they say, that all processes say the same."""

import math

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState

from snell_diffusion.training.adapter_tensors import trainable_parameters
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.training.finite import (
    found_anywhere,
    not_finite,
    refuse_loss,
    require_finite_weights,
    require_sound,
    total_norm,
)
from snell_diffusion.training.loop import LoopSettings, TrainState, train
from snell_diffusion.training.parallel import Parallel, Replicated
from snell_diffusion.training.signals import StopRequest
from tests.training.models import adapted


def alone() -> Parallel:
    return Replicated(Accelerator(cpu=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_weights_are_named(value: float) -> None:
    model = adapted()
    weights = trainable_parameters(model)
    require_finite_weights(weights, "now", alone())
    assert bool(total_norm(weights.values()).isfinite())
    with torch.no_grad():
        model["net"].second.snella_A["default"][0, 0, 0] = value
    assert not_finite(weights) == ["net.second.snella_A.default"]
    assert not bool(total_norm(weights.values()).isfinite())
    with pytest.raises(
        NonFiniteError, match=r"now weights are NaN.* in net\.second\.snella_A\.default; nothing"
    ):
        require_finite_weights(weights, "now", alone())


def test_nothing_is_finite() -> None:
    assert not_finite({}) == []


class Broken:
    def culprits(self) -> list[str]:
        return ["photo 'cat.png'"]


@pytest.mark.parametrize(
    "totals, loss, said",
    [
        ({"loss": math.nan}, None, "in loss; the step was not taken"),
        ({"loss": math.nan, "prior": math.inf, "rest": 1.0}, None, "in prior; the step"),
        ({"loss": math.nan, "rest": 1.0}, None, "in its sum; the step"),
        ({"loss": math.nan, "part": math.nan}, Broken(), "in part; photo 'cat.png'; the step"),
    ],
)
def test_a_loss_names_its_parts_and_samples(
    totals: dict[str, float], loss: object, said: str
) -> None:
    tensors = {name: torch.tensor(value) for name, value in totals.items()}
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step 7, .* 1.0e-03, {said}"):
        refuse_loss(tensors, math.nan, loss, 7, 1e-3, alone())


def two_processes() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before this one
    parallel = alone()
    assert parallel.world == 2, "two processes were asked for"
    assert found_anywhere([], parallel) == []
    assert found_anywhere(["both"], parallel) == ["both"]
    mine = ["both", f"only {parallel.rank}"] if parallel.rank else ["both"]
    assert found_anywhere(mine, parallel) == ["both", "only 1 (process 1)"]
    with pytest.raises(NonFiniteError, match=r"^bad: photo 'a' \(process 1\)\. Do this$"):
        require_sound(["photo 'a'"] if parallel.rank else [], "bad", "Do this", parallel)

    one_process_is_spoilt(parallel)


def one_process_is_spoilt(parallel: Parallel) -> None:
    """A weight of process 1 alone is NaN: both stop, neither moves."""
    model = adapted("lora")
    parameters = [p for p in model["net"].parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1))
    if parallel.rank:
        parameters[0].data[0, 0] = math.nan
    before = [p.detach().clone() for p in parameters]

    def loss_at(step: int, micro: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return parameters[1].square().mean(), {}

    with pytest.raises(
        NonFiniteError,
        match=r"before step 1, .*first\.lora_A\.default\.weight \(process 1\); the s",
    ):
        train(state, loss_at, LoopSettings(0, 2), parallel, print, StopRequest())
    for now, then in zip(parameters, before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))


def test_processes_agree() -> None:
    debug_launcher(two_processes, num_processes=2)
