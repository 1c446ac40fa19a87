"""Optimizer, schedule, competition and devices of a run, from its config."""

from typing import Any

import torch

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.setup import ADAPTER
from snell_diffusion.training import competition, start
from snell_diffusion.training.adapter_tensors import Components
from snell_diffusion.training.early_stop import BestAdapter
from snell_diffusion.training.ema import AdapterEma
from snell_diffusion.training.loop import Competes, LoopSettings, TrainState
from snell_diffusion.training.optimizers import make_optimizer
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.tuners import param_groups


def parameter_groups(config: TrainConfig, components: Components) -> list[dict[str, Any]]:
    """Optimizer groups: factors and scalars (no weight decay) of denoiser and text encoders."""
    groups = []
    for index, model in enumerate(components.values()):
        text_rate = config.text_encoder_lr if index else None
        groups += param_groups(
            model,
            ADAPTER,
            lr=text_rate or config.learning_rate,
            weight_decay=config.adam_weight_decay,
            scalar_lr=config.scalar_learning_rate,
            token_lr=config.token_learning_rate,
        )
    return groups


def build_optimizer(config: TrainConfig, components: Components) -> torch.optim.Optimizer:
    """The optimizer of the config over all trainable parameters."""
    defaults: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
        # An adapter is hundreds of small tensors: one call for all of them, where the class can.
        "fused": True,
    }
    return make_optimizer(
        config.optimizer, parameter_groups(config, components), defaults, config.optimizer_args
    )


def build_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning-rate schedule over optimizer steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def build_competition(config: TrainConfig, components: Components) -> Competes | None:
    """The competition of layers or ranks; None for methods without one.

    Raises:
        SnellaConfigError: Its schedule does not fit into the run.
    """
    return competition.build_competition(
        components,
        ADAPTER,
        config.max_train_steps,
        config.mixed_precision,
        "the layers' competition cannot be scheduled",
    )


def build_best(config: TrainConfig, components: Components) -> BestAdapter | None:
    """What watches the held-out loss; None without early_stopping_patience."""
    patience = config.early_stopping_patience
    if patience is None:
        return None
    return BestAdapter(components, patience, config.early_stopping_min_delta)


def build_state(config: TrainConfig, components: Components, parallel: Parallel) -> TrainState:
    """Everything that training steps change, at step 0."""
    optimizer = parallel.prepare(components, build_optimizer(config, components))
    decay = config.ema_decay
    return TrainState(
        components=components,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        competition=build_competition(config, components),
        ema=None if decay is None else AdapterEma(components, decay),
        best=build_best(config, components),
        scaler=torch.amp.GradScaler(parallel.device.type, enabled=config.mixed_precision == "fp16"),
    )


def loop_settings(config: TrainConfig) -> LoopSettings:
    """Length and gradients of the run."""
    return LoopSettings(
        seed=config.seed,
        steps=config.max_train_steps,
        accumulation=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        batch=config.train_batch_size,
    )


def start_processes(config: TrainConfig) -> Parallel:
    """Device, precision and processes, checked against what the launcher asked for.

    Raises:
        SnellaConfigError: A precision that this device does not run, or another number of processes
            or another strategy than the launcher was asked for.
    """
    return start.start_processes(config.mixed_precision, config.report_to, config.output_dir)
