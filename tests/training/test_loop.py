"""The loop: exact resume, nothing changed by a bad step, accumulation, stopping."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from snell_diffusion.training.adapter_tensors import adapter_tensors
from snell_diffusion.training.checkpoints import Checkpoint
from snell_diffusion.training.ema import AdapterEma
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.training.loop import LoopSettings, LossAt, TrainState, train
from snell_diffusion.training.parallel import Replicated
from snell_diffusion.training.randomness import normal
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.tuners import Competition
from tests.training.models import adapted

STEPS = 6


def state_of(components: dict[str, nn.Module]) -> TrainState:
    net = components["net"]
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = net.first.configs["default"]
    return TrainState(
        components=components,
        optimizer=optimizer,
        scheduler=scheduler,
        competition=Competition(components, "default", config, STEPS),
        ema=AdapterEma(components, 0.9),
    )


def loss_of(components: Mapping[str, nn.Module]) -> LossAt:
    def loss_at(step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = normal((4, 6), 0, "x", step, micro)
        loss = components["net"](x).square().mean()
        return loss, {"part": loss.detach() * 2}

    return loss_at


def go(
    state: TrainState,
    loss_at: LossAt,
    steps: int,
    on_step: Callable[[dict[str, float]], None] = lambda numbers: None,
    stop: StopRequest | None = None,
    accumulation: int = 2,
    max_grad_norm: float = 1.0,
) -> bool:
    settings = LoopSettings(0, steps, accumulation, max_grad_norm)
    parallel = Replicated(Accelerator(cpu=True))
    return train(state, loss_at, settings, parallel, on_step, stop or StopRequest())


def snapshot(state: TrainState) -> dict[str, Tensor]:
    tensors, _ = state.pack()
    return {
        f"{group}/{name}": tensor.detach().clone().nan_to_num(7.0)
        for group, values in tensors.items()
        for name, tensor in values.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def checkpoint(state: TrainState) -> Checkpoint:
    tensors, plain = state.pack()
    copies = {g: {k: v.detach().clone() for k, v in vs.items()} for g, vs in tensors.items()}
    return Checkpoint(path=None, step=state.step, tensors=copies, state=plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resume_is_bit_identical(cut: int) -> None:
    whole = adapted()
    whole_state = state_of(whole)
    go(whole_state, loss_of(whole), STEPS)

    first = adapted()
    first_state = state_of(first)
    go(first_state, loss_of(first), cut)
    second = adapted(seed=0)
    second_state = state_of(second)
    torch.manual_seed(123)  # what the process drew before must not matter
    second_state.restore(checkpoint(first_state))
    assert second_state.step == cut
    go(second_state, loss_of(second), STEPS)
    assert same(snapshot(second_state), snapshot(whole_state))
    assert second_state.competition.report() == whole_state.competition.report()


def test_levels_compete_during_training() -> None:
    model = adapted()
    state = state_of(model)
    go(state, loss_of(model), STEPS)
    assert state.competition.kept_share() < 1
    assert model["net"].first.sparsity("default") != model["net"].second.sparsity("default")


def test_accumulated_batches_equal_their_mean() -> None:
    """Two micro-batches give the gradient of the mean of their losses."""
    model, other = adapted("lora"), adapted("lora")
    for components in (model, other):
        components["net"].eval()  # dropout draws differ between one batch and two

    def make(components: dict[str, nn.Module]) -> TrainState:
        parameters = [p for p in components["net"].parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return TrainState(
            components, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
        )

    def both(step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        losses = [loss_of(other)(step, m)[0] for m in (0, 1)]
        return (losses[0] + losses[1]) / 2, {}

    numbers: list[dict[str, float]] = []
    go(make(model), loss_of(model), 2, numbers.append, accumulation=2)
    go(make(other), both, 2, numbers.append, accumulation=1)
    for a, b in zip(adapter_tensors(model).values(), adapter_tensors(other).values(), strict=True):
        torch.testing.assert_close(a, b)
    assert math.isclose(numbers[0]["loss"], numbers[2]["loss"], rel_tol=1e-6)
    assert math.isclose(numbers[0]["part"], 2 * numbers[0]["loss"], rel_tol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_changes_nothing(bad: float) -> None:
    model = adapted()
    state = state_of(model)
    go(state, loss_of(model), 2)
    before = snapshot(state)

    def broken(step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = loss_of(model)(step, micro)
        return loss * (bad if step == 3 else 1.0), parts

    with pytest.raises(NonFiniteError, match=r"loss is (nan|inf) at step 3, learning rate"):
        go(state, broken, STEPS)
    assert state.step == 2
    after = snapshot(state)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert not {k for k in changed if not k.startswith("adapter/") or "sparsity" not in k}


def test_a_bad_gradient_is_found_where_the_loss_is_fine() -> None:
    model = adapted()
    state = state_of(model)

    def broken(step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = loss_of(model)(step, micro)
        # sqrt has an infinite derivative at zero
        return loss + (loss - loss.detach()).sqrt(), parts

    before = snapshot(state)
    with pytest.raises(NonFiniteError, match="gradient norm is nan at step 1"):
        go(state, broken, STEPS)
    assert same(snapshot(state), before)


def test_stop_ends_after_the_current_step() -> None:
    model = adapted()
    state, stop = state_of(model), StopRequest()

    def on_step(numbers: dict[str, float]) -> None:
        if state.step == 3:
            stop.request()

    assert go(state, loss_of(model), STEPS, on_step, stop)
    assert state.step == 3
    assert not go(state_of(adapted()), loss_of(adapted()), 1)


def test_gradients_are_clipped_to_the_norm() -> None:
    norms: list[float] = []
    for limit in (1e-4, 0.0):
        model = adapted("lora")
        model["net"].eval()
        parameters = [p for p in model["net"].parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
        numbers: list[dict[str, float]] = []
        state = TrainState(model, optimizer, scheduler)
        go(state, loss_of(model), 1, numbers.append, max_grad_norm=limit)
        moves = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        norms.append(float(torch.cat([m.flatten() for m in moves]).norm()))
        assert numbers[0]["grad_norm"] > 1e-3
    assert norms[0] == pytest.approx(1e-4, rel=1e-3)
    assert norms[1] == pytest.approx(numbers[0]["grad_norm"], rel=1e-5)
