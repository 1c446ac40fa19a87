"""The training loop: one for every model family and every method.

A step draws its randomness from counters, checks that loss and gradients are finite before it
changes anything, and leaves a state from which an identical run can continue.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from snell_diffusion.training.adapter_tensors import (
    Components,
    adapter_tensors,
    copy_adapter_tensors,
    trainable_parameters,
)
from snell_diffusion.training.checkpoints import Checkpoint, Tensors
from snell_diffusion.training.early_stop import BestAdapter
from snell_diffusion.training.ema import AdapterEma
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.finite import (
    refuse_gradients,
    refuse_loss,
    refuse_weights,
    total_norm,
)
from snell_diffusion.training.fit import require_fit
from snell_diffusion.training.optimizers import own_rate, pack_optimizer, unpack_optimizer
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.randomness import seed_torch
from snell_diffusion.training.signals import StopRequest

LossAt = Callable[[int, int], tuple[Tensor, dict[str, Tensor]]]
"""(step, micro-batch) -> loss to minimise and detached parts to log."""

_MOST_SKIPPED = 20


class Competes(Protocol):
    """Layers that compete for a budget of kept entries (see tuners.competition)."""

    def observe(self) -> None:
        """Take in parameters and gradients after an optimizer step."""

    def due(self, step: int) -> bool:
        """Whether the schedule sets new levels at a step, the same on every process."""

    def update(self, step: int) -> bool:
        """Set the levels of a step, counted from 0; whether they changed."""

    def digest(self) -> str:
        """SHA-256 in hex of the levels now."""

    def kept_share(self) -> float | None:
        """Share of all entries that the layers may keep together now; None without levels."""

    def report(self) -> list[dict[str, Any]]:
        """One row per layer for logs and pictures; none without levels."""

    def state_dict(self) -> dict[str, Any]:
        """Statistics by name: plain numbers, strings and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""


@dataclass(frozen=True)
class LoopSettings:
    """Length and gradients of a run.

    Attributes:
        seed: Seed of the run.
        steps: Optimizer steps in all.
        accumulation: Micro-batches per optimizer step.
        max_grad_norm: Norm above which gradients are scaled down; 0 = never.
        batch: Samples of one process in a micro-batch.
    """

    seed: int
    steps: int
    accumulation: int = 1
    max_grad_norm: float = 1.0
    batch: int = 1


@dataclass
class TrainState:
    """Everything that a step changes."""

    components: Components
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    competition: Competes | None = None
    ema: AdapterEma | None = None
    best: BestAdapter | None = None
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False)
    )
    step: int = 0
    skipped: int = 0
    parameters: list[torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(trainable_parameters(self.components).values())

    @property
    def exhausted(self) -> bool:
        """Whether measurements say that more steps are not worth it."""
        return self.best is not None and self.best.exhausted

    def pack(self) -> tuple[Tensors, dict[str, Any]]:
        """Tensors and plain values of a checkpoint."""
        optimizer_tensors, optimizer = pack_optimizer(self.optimizer)
        tensors: Tensors = {
            "adapter": adapter_tensors(self.components),
            "optimizer": optimizer_tensors,
        }
        state: dict[str, Any] = {
            "step": self.step,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.shadow
        if self.best is not None:
            tensors["best"] = self.best.tensors
            state["best"] = self.best.state_dict()
        if self.competition is not None:
            scores = self.competition.state_dict()
            tensors["competition"] = {k: v for k, v in scores.items() if isinstance(v, Tensor)}
            state["competition"] = {k: v for k, v in scores.items() if not isinstance(v, Tensor)}
        return tensors, state

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same run.

        Raises:
            CheckpointError: It does not fit; nothing was changed.
        """
        tensors, state = checkpoint.tensors, checkpoint.state
        places = [p for group in self.optimizer.param_groups for p in group["params"]]
        require_fit(checkpoint, *self.pack(), places)
        if self.best is not None:
            try:
                self.best.load(state["best"], tensors["best"])
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {checkpoint.path}: {error}") from error
        if self.competition is not None:
            try:
                scores = {**state["competition"], **tensors["competition"]}
                self.competition.load_state_dict(scores)
            except ValueError as error:
                raise CheckpointError(f"checkpoint {checkpoint.path}: {error}") from error
        copy_adapter_tensors(self.components, tensors["adapter"])
        unpack_optimizer(self.optimizer, tensors["optimizer"], state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load(tensors["ema"])
        self.step, self.skipped = checkpoint.step, state["skipped"]


def train(
    state: TrainState,
    loss_at: LossAt,
    settings: LoopSettings,
    parallel: Parallel,
    on_step: Callable[[dict[str, float]], None],
    stop: StopRequest,
) -> bool:
    """Run the steps after `state.step`.

    Args:
        state: Where the run stands; changed in place.
        loss_at: The objective.
        settings: Length and gradients.
        parallel: Device, precision and processes.
        on_step: Called after every step with its numbers (loss, lr, grad_norm, ...).
        stop: Ends the run after the current step.

    Returns:
        True if a stop request on any process ended the run; False if it is done, also where
        `state.best` found more steps not worth it.

    Raises:
        NonFiniteError: Loss, gradient or weights are not finite; the step was not taken.
        DivergedError: The processes hold different levels.
    """
    while state.step < settings.steps and not state.exhausted:
        numbers, stopping = _one_step(state, loss_at, settings, parallel, stop)
        on_step(numbers)
        # Several processes must agree on the step, so there only the shared flag counts.
        if parallel.world == 1:
            stopping = stop.signum is not None
        if stopping and state.step < settings.steps and not state.exhausted:
            return True
    return False


def _one_step(
    state: TrainState,
    loss_at: LossAt,
    settings: LoopSettings,
    parallel: Parallel,
    stop: StopRequest,
) -> tuple[dict[str, float], bool]:
    step = state.step + 1
    _set_levels(state, parallel)
    totals = _backward(state, loss_at, settings, parallel, step)
    parallel.average_gradients(state.parameters)
    # After the exchange, so that an overflow on one process is one on all of them.
    state.scaler.unscale_(state.optimizer)
    norms = {
        "grad_norm": total_norm(p.grad for p in state.parameters if p.grad is not None),
        "weight_norm": total_norm(state.parameters),
    }
    numbers, stopping = _read_numbers(totals, norms, stop, parallel)
    sound = _require_finite_step(state, loss_at, totals, numbers, parallel)
    numbers["lr"] = float(state.optimizer.param_groups[0]["lr"])
    estimate = own_rate(state.optimizer)
    if estimate is not None:
        numbers["d"] = estimate
    if sound:
        if settings.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(
                state.parameters, settings.max_grad_norm, norms["grad_norm"]
            )
        _apply(state, parallel, step)
    else:
        numbers["skipped"] = state.skipped
        _skip(state)
    state.step = step
    return numbers, stopping


def _set_levels(state: TrainState, parallel: Parallel) -> None:
    """Let the layers compete where the schedule says so; every process must find the same."""
    competition = state.competition
    if competition is None:
        return
    competition.update(state.step)
    if competition.due(state.step):
        parallel.require_equal(competition.digest(), f"the layers' levels after step {state.step}")


def _backward(
    state: TrainState,
    loss_at: LossAt,
    settings: LoopSettings,
    parallel: Parallel,
    step: int,
) -> dict[str, Tensor]:
    """Accumulate the gradients of all micro-batches; return the mean of what they log."""
    totals: dict[str, Tensor] = {}
    for micro in range(settings.accumulation):
        # Dropout inside a model draws from the global generator, which must not depend on the past;
        # the counter is where this process's samples begin in the global batch.
        seed_torch(settings.seed, "model", step, micro, parallel.rank * settings.batch)
        with parallel.accelerator.autocast():
            loss, parts = loss_at(step, micro)
        loss = loss / settings.accumulation
        parallel.backward(state.scaler.scale(loss))
        for name, value in {"loss": loss.detach(), **parts}.items():
            share = value if name == "loss" else value / settings.accumulation
            totals[name] = totals[name] + share if name in totals else share
    return totals


def _read_numbers(
    totals: dict[str, Tensor], norms: dict[str, Tensor], stop: StopRequest, parallel: Parallel
) -> tuple[dict[str, float], bool]:
    """Bring the step's numbers to the CPU at once (one wait), averaged over processes.

    A value that is not finite on any process is not finite in the mean, so all of them see it.
    """
    found = {**totals, **norms}
    like = norms["grad_norm"]
    asked = torch.full_like(like, float(stop.signum is not None))
    packed = parallel.mean(torch.stack([*(v.to(like) for v in found.values()), asked]))
    *values, asked_value = packed.tolist()
    return dict(zip(found, values, strict=True)), asked_value > 0


def _require_finite_step(
    state: TrainState,
    loss_at: LossAt,
    totals: dict[str, Tensor],
    numbers: dict[str, float],
    parallel: Parallel,
) -> bool:
    """Whether the step can be taken; False if only the scaled gradients overflowed.

    Takes the weights' norm out of `numbers`, and the gradients' where it is not finite.
    """
    step, rate = state.step + 1, float(state.optimizer.param_groups[0]["lr"])
    if not math.isfinite(numbers.pop("weight_norm")):
        refuse_weights(trainable_parameters(state.components), step, rate, parallel)
    if not math.isfinite(numbers["loss"]):
        refuse_loss(totals, numbers["loss"], loss_at, step, rate, parallel)
    if math.isfinite(numbers["grad_norm"]):
        state.skipped = 0
        return True
    # A GradScaler finds its scale by overflowing now and then; without one this is an error.
    if not state.scaler.is_enabled() or state.skipped == _MOST_SKIPPED:
        named = trainable_parameters(state.components).items()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        refuse_gradients(gradients, numbers, step, rate, state.skipped, parallel)
    del numbers["grad_norm"]
    state.skipped += 1
    return False


def _skip(state: TrainState) -> None:
    """Spend the step's batch and lower the gradients' scale; nothing else moves.

    Parameters, scores, average and learning rate stay those of the step before. The scale is set
    here rather than by the scaler, which sees infinite gradients but no norm beyond float32.
    """
    state.scaler.update(state.scaler.get_scale() * state.scaler.get_backoff_factor())
    state.optimizer.zero_grad(set_to_none=True)


def _apply(state: TrainState, parallel: Parallel, step: int) -> None:
    """Update the adapter, the scores of its layers, the average and the learning rate."""
    parallel.step(state.optimizer, state.scaler)
    if state.competition is not None:
        state.competition.observe()
    if state.ema is not None:
        state.ema.update(step)
    state.scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)
