"""Optimizer, schedule, competition and devices of a run, from its config."""

import dataclasses
from typing import Any

import torch
from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training import competition, start
from snell_diffusion.training.adapter_tensors import Components, trainable_parameters
from snell_diffusion.training.early_stop import BestAdapter
from snell_diffusion.training.ema import AdapterEma
from snell_diffusion.training.loop import Competes, LoopSettings, TrainState
from snell_diffusion.training.optimizers import make_optimizer
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.tuners import Competition
from snell_diffusion.vision.batches import Order
from snell_diffusion.vision.config import VisionConfig
from snell_diffusion.vision.method import ADAPTER
from snell_diffusion.vision.models import HEAD
from snell_diffusion.vision.schedule import build_scheduler

_NEVER = 2**31  # measurements without a better one after which a run without patience ends


def run_length(config: VisionConfig, order: Order) -> int:
    """Optimizer steps of a run."""
    return config.max_train_steps or (config.num_train_epochs or 1) * order.per_epoch


def parameter_groups(
    config: VisionConfig, model: nn.Module, extras: list[str]
) -> list[dict[str, Any]]:
    """Every trained tensor, in groups of one learning rate and one weight decay.

    Matrices and larger decay; vectors, biases, single numbers and `extras` (the class token) do
    not: the groups of the public SNELL code (timm's).
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in trainable_parameters({"": model}).items():
        name = path.removeprefix(".")
        kind, rate = "body", config.learning_rate
        if name.startswith(f"{HEAD}."):
            kind, rate = "head", config.head_learning_rate or config.learning_rate
        elif parameter.numel() == 1:
            kind, rate = "scalars", config.scalar_learning_rate or config.learning_rate
        decays = parameter.ndim > 1 and name not in extras
        kind = kind if decays else f"{kind}_undecayed"
        decay = config.adam_weight_decay if decays else 0.0
        group = {"name": kind, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault(kind, group)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    config: VisionConfig, model: nn.Module, extras: list[str]
) -> torch.optim.Optimizer:
    """The optimizer of the config over all trained parameters."""
    defaults: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
        "fused": True,  # hundreds of small tensors: one call for all of them, where the class can
    }
    groups = parameter_groups(config, model, extras)
    return make_optimizer(config.optimizer, groups, defaults, config.optimizer_args)


class EpochCompetition:
    """A competition whose steps are epochs, as in the published loops.

    Levels are set before an epoch, with its index from 0; scores take in every optimizer step.

    Args:
        inner: Set up for as many steps as the run has epochs.
        per_epoch: Optimizer steps of an epoch.
    """

    def __init__(self, inner: Competition, per_epoch: int) -> None:
        self.inner, self.per_epoch = inner, per_epoch

    def observe(self) -> None:
        """Take in parameters and gradients after an optimizer step."""
        self.inner.observe()

    def due(self, step: int) -> bool:
        """Whether levels may change before a step, from 0."""
        return step % self.per_epoch == 0 and self.inner.due(step // self.per_epoch)

    def digest(self) -> str:
        """SHA-256 in hex of the levels now."""
        return self.inner.digest()

    def update(self, step: int) -> bool:
        """Set the levels before a step, from 0, if an epoch begins; whether they changed."""
        return step % self.per_epoch == 0 and self.inner.update(step // self.per_epoch)

    def kept_share(self) -> float:
        """Share of all entries of all layers that they may keep together now."""
        return self.inner.kept_share()

    def report(self) -> list[dict[str, Any]]:
        """One row per layer, see `Competition.report`."""
        return self.inner.report()

    def state_dict(self) -> dict[str, Any]:
        """See `Competition.state_dict`."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Competition.load_state_dict`."""
        self.inner.load_state_dict(state)


def build_competition(
    config: VisionConfig, components: Components, per_epoch: int, steps: int
) -> Competes | None:
    """The competition of the layers; None for methods without one.

    Raises:
        SnellaConfigError: Its schedule does not fit into the run.
    """
    epochs = -(-steps // per_epoch)
    by_epoch = config.allocate == "epoch"
    found = competition.build_competition(
        components,
        ADAPTER,
        epochs if by_epoch else steps,
        config.mixed_precision,
        f"the layers' competition does not fit into {epochs} epochs of {per_epoch} steps "
        f"(allocate {config.allocate})",
    )
    if by_epoch and isinstance(found, Competition):  # AdaLoRA's ranks compete by steps anyway
        return EpochCompetition(found, per_epoch)
    return found


def build_state(
    config: VisionConfig,
    components: Components,
    extras: list[str],
    order: Order,
    parallel: Parallel,
) -> TrainState:
    """Everything that training steps change, at step 0."""
    model, steps = next(iter(components.values())), run_length(config, order)
    optimizer = parallel.prepare(components, build_optimizer(config, model, extras))
    decay = config.ema_decay
    return TrainState(
        components=components,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, order.per_epoch, steps),
        competition=build_competition(config, components, order.per_epoch, steps),
        ema=None if decay is None else AdapterEma(components, decay, config.protocol != "paper"),
        best=BestAdapter(components, config.early_stopping_patience or _NEVER, 0.0),
        scaler=torch.amp.GradScaler(parallel.device.type, enabled=config.mixed_precision == "fp16"),
    )


def loop_settings(config: VisionConfig, steps: int) -> LoopSettings:
    """Length and gradients of the run."""
    return LoopSettings(
        seed=config.seed,
        steps=steps,
        accumulation=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm or 0.0,
        batch=config.train_batch_size,
    )


def start_processes(config: VisionConfig) -> Parallel:
    """Device, precision and processes, checked against what the launcher asked for.

    Raises:
        SnellaConfigError: A precision that this device does not run, a strategy that shards the
            model, or another number of processes than the launcher was asked for.
    """
    parallel = start.start_processes(config.mixed_precision, config.report_to, config.output_dir)
    if parallel.shares_forward:
        raise SnellaConfigError(
            f"classification runs whole models on every process, asked for {parallel.name}: use "
            "DDP (configs/accelerate/cpu.yaml for processes on the CPU)"
        )
    return parallel


def with_settings(config: VisionConfig, **changes: Any) -> VisionConfig:
    """The same run with other settings."""
    return dataclasses.replace(config, **changes)
