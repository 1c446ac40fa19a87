"""Load the base, put the adapters in, build optimizer and schedule: config -> things to train."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig
from torch import nn

from snell_diffusion.adapters.identity import config_hash
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.families import Family, family_of
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.adapter_tensors import (
    Components,
    trainable_parameters,
    tuner_layers,
)
from snell_diffusion.training.optimizers import make_optimizer
from snell_diffusion.training.randomness import seed_torch
from snell_diffusion.tuners import Competition, SnellaConfig, param_groups

ADAPTER = "default"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SNELLA_FIELDS = {
    "rank": "r",
    "heads": "heads",
    "kernel": "kernel",
    "sparsify": "sparsify",
    "init_sparsity": "init_sparsity",
    "target_sparsity": "target_sparsity",
    "init": "init",
    "init_scale": "init_scale",
    "update_scale": "scale",
    "dropout": "dropout",
    "train_alpha": "train_alpha",
    "train_gamma": "train_gamma",
    "train_beta": "train_beta",
    "alloc_init_warmup": "alloc_init_warmup",
    "alloc_final_warmup": "alloc_final_warmup",
    "alloc_interval": "alloc_interval",
    "alloc_beta1": "alloc_beta1",
    "alloc_beta2": "alloc_beta2",
    "alloc_metric": "alloc_metric",
}
_LORA_FIELDS = ("rank", "update_scale", "dropout")
_LORA_RANK = 16


def base_path(config: TrainConfig) -> str:
    """Folder or hub id of the base; `embedded` is the model that ships with this package."""
    if config.pretrained_model_name_or_path == "embedded":
        from snell_diffusion.models import embedded_path

        return str(embedded_path())
    return config.pretrained_model_name_or_path


def load_base(config: TrainConfig) -> tuple[Family, Any]:
    """Load the frozen base on the CPU: its family and its pipeline.

    Raises:
        SnellaBaseError: No such base, or no family covers it.
    """
    source = base_path(config)
    family = family_of(source, config.revision)
    options = {"revision": config.revision, "variant": config.variant}
    pipe = family.load(source, **{k: v for k, v in options.items() if v is not None})
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval().float()
    # VAE and text encoders stay float32: they run once, and a 16-bit VAE can overflow to black.
    getattr(pipe, family.denoiser).to(DTYPES[config.mixed_precision])
    return family, pipe


def base_digest(model: nn.Module) -> str:
    """SHA-256 over settings, names, shapes and 64 numbers of every weight of a base model."""
    found = hashlib.sha256(config_hash(model).encode())
    for name, weight in model.named_parameters():
        found.update(f"{name} {tuple(weight.shape)}".encode())
        some = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
        found.update(some.float().cpu().numpy().tobytes())
    return found.hexdigest()


def method_config(config: TrainConfig, family: Family, *, text: bool = False) -> PeftConfig:
    """The PEFT config of `--method` for the denoiser, or for a text encoder (`text`).

    Raises:
        SnellaConfigError: A setting does not exist for the method.
    """
    targets = list(family.text_targets if text else config.target_modules or family.targets)
    given = {name: getattr(config, name) for name in _SNELLA_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if text and config.text_encoder_rank is not None:
        given["rank"] = config.text_encoder_rank
    return _METHODS[config.method](given, targets, config.seed)


def _snella(given: dict[str, Any], targets: list[str], seed: int) -> PeftConfig:
    values = {_SNELLA_FIELDS[name]: value for name, value in given.items()}
    try:
        return SnellaConfig.diffusion(target_modules=targets, seed=seed, **values)
    except ValueError as error:
        raise SnellaConfigError(f"method snella: {error}") from error


def _lora(given: dict[str, Any], targets: list[str], seed: int) -> PeftConfig:
    unknown = sorted(set(given) - set(_LORA_FIELDS))
    if unknown:
        raise SnellaConfigError(
            f"method lora has no {', '.join(unknown)}; it takes {', '.join(_LORA_FIELDS)}"
        )
    rank = given.get("rank", _LORA_RANK)
    return LoraConfig(
        r=rank,
        lora_alpha=rank * given.get("update_scale", 1.0),
        lora_dropout=given.get("dropout", 0.0),
        init_lora_weights="gaussian",
        target_modules=targets,
    )


_METHODS = {"snella": _snella, "lora": _lora}


def add_adapters(config: TrainConfig, family: Family, pipe: Any) -> dict[str, nn.Module]:
    """Wrap the target layers; return the adapted components by name, denoiser first.

    Raises:
        SnellaConfigError: No layer matches the targets.
    """
    plan = [(family.denoiser, method_config(config, family))]
    if config.train_text_encoder:
        text = method_config(config, family, text=True)
        plan += [(name, text) for name in family.text_encoders]
    components: dict[str, nn.Module] = {}
    for index, (name, settings) in enumerate(plan):
        components[name] = getattr(pipe, name)
        seed_torch(config.seed, "init", index)
        try:
            components[name].add_adapter(settings, adapter_name=ADAPTER)  # type: ignore[operator]
        except ValueError as error:
            raise SnellaConfigError(f"{name} cannot be adapted: {error}") from error
    for parameter in trainable_parameters(components).values():
        parameter.data = parameter.data.float()
    return components


@dataclass(frozen=True)
class Sizes:
    """How much is adapted and trained."""

    layers: int
    trainable: int
    adapted: int
    base: int


def sizes(components: Components) -> Sizes:
    """Count wrapped layers, trainable numbers, numbers in the wrapped weights and in the models."""
    trainable = trainable_parameters(components)
    layers = [layer for _, layer in tuner_layers(components)]
    everything = sum(p.numel() for m in components.values() for p in m.parameters())
    count = sum(p.numel() for p in trainable.values())
    adapted = sum(layer.get_base_layer().weight.numel() for layer in layers)
    return Sizes(len(layers), count, adapted, everything - count)


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
        )
    return groups


def build_optimizer(config: TrainConfig, components: Components) -> torch.optim.Optimizer:
    """The optimizer of the config over all trainable parameters."""
    defaults: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
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


def build_competition(config: TrainConfig, components: Components) -> Any:
    """The competition of the layers for kept entries; None for methods without sparsity levels."""
    settings = next(iter(components.values())).peft_config[ADAPTER]  # type: ignore[union-attr,index]
    if not isinstance(settings, SnellaConfig) or settings.sparsify == "none":
        return None
    try:
        return Competition(components, ADAPTER, settings, config.max_train_steps)
    except ValueError as error:
        raise SnellaConfigError(f"the layers' competition cannot be scheduled: {error}") from error


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, precision and processes, checked against what the launcher asked for.

    Raises:
        SnellaConfigError: A strategy or a precision that this trainer does not run.
    """
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise SnellaConfigError(
                f"{variable} is set, but adapters train with plain data parallelism; launch "
                f"without FSDP or DeepSpeed"
            )
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise SnellaConfigError("mixed_precision fp16 needs a GPU; use bf16 or no on the CPU")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise SnellaConfigError(
            f"the launcher started {asked} processes, but accelerate reports "
            f"{accelerator.num_processes}; they would train apart and overwrite each other"
        )
    return accelerator
