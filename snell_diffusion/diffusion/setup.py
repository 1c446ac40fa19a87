"""Load the base and put the adapters in: config -> a pipeline with trainable layers."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from snell_diffusion.adapters.identity import config_hash
from snell_diffusion.diffusion.compiling import compile_denoiser
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.families import Conditions, Family, family_of
from snell_diffusion.diffusion.loaded import models_of
from snell_diffusion.diffusion.losses import Objective
from snell_diffusion.diffusion.new_tokens import add_words, new_words
from snell_diffusion.diffusion.phases import Phases, place
from snell_diffusion.diffusion.quantization import entries, loading_options, plain_values
from snell_diffusion.diffusion.run_folder import kind_of
from snell_diffusion.diffusion.timesteps import TimestepSettings
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.models import SHIPPED_BASES, embedded_path
from snell_diffusion.training.adapter_tensors import (
    Components,
    trainable_parameters,
    tuner_layers,
)
from snell_diffusion.training.config_types import named_values
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.randomness import seed_torch
from snell_diffusion.tuners.grouping import group_small_layers
from snell_diffusion.tuners.recipes import recipe
from snell_diffusion.tuners.tokens import TokenLayer, Word, spelled

ADAPTER = "default"
# Sides of training pictures, in parts of the base's own, below and above which we warn.
_SMALLEST_SHARE, _LARGEST_SHARE = 0.7, 1.6
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Settings of the method that have a key of their own in a run's config.
_SETTINGS = (
    *("rank", "update_scale", "dropout", "heads", "kernel", "sparsify"),
    *("init_sparsity", "target_sparsity", "init", "init_scale"),
    *("train_alpha", "train_gamma", "train_beta"),
    *("alloc_init_warmup", "alloc_final_warmup", "alloc_interval"),
    *("alloc_beta1", "alloc_beta2", "alloc_metric"),
)


def base_path(config: TrainConfig) -> str:
    """Folder or hub id of the base; some names stand for models that ship with this package."""
    name = config.pretrained_model_name_or_path
    return str(embedded_path(name)) if name in SHIPPED_BASES else name


def load_base(config: TrainConfig) -> tuple[Family, Any]:
    """Load the frozen base on the CPU: its family and its pipeline.

    Raises:
        SnellaBaseError: No such base, or no family covers it.
        SnellaConfigError: It cannot be trained at this resolution, or not be quantized here; found
            before any weight loads.
    """
    source = base_path(config)
    family = family_of(source, config.revision)
    _require_size(config, family)
    precisions = precisions_of(config, family)
    quantized = loading_options(
        config.base_quantization, family.denoiser, precisions[family.denoiser]
    )
    options = {"revision": config.revision, "variant": config.variant}
    given = {name: value for name, value in options.items() if value is not None}
    pipe = family.load(source, dtype=precisions, **given, **quantized)
    for name, model in models_of(pipe).items():
        wanted = precisions.get(name, precisions["default"])
        if model.dtype != wanted and not (quantized and name == family.denoiser):
            model.to(wanted)
        model.requires_grad_(False).eval()
    return family, pipe


def precisions_of(config: TrainConfig, family: Family) -> dict[str, torch.dtype]:
    """What the weights of each component are kept in; "default" is for those not named.

    VAE and small text encoders stay float32: they run once, and a 16-bit VAE can turn black.
    """
    half = DTYPES[config.mixed_precision]
    # In bfloat16 also beside a float16 denoiser: T5 and the language models overflow in float16.
    large = torch.bfloat16 if half == torch.float16 else half
    encoders = dict.fromkeys(family.large_encoders, large)
    return {"default": torch.float32, family.denoiser: half, **encoders}


def _require_size(config: TrainConfig, family: Family) -> None:
    side, multiple = config.resolution, family.multiple
    if side % multiple:
        below = max(multiple, side - side % multiple)
        raise SnellaConfigError(
            f"resolution is {side}, but a base of the family {family.name} takes multiples of "
            f"{multiple} pixels: use {below} or {side - side % multiple + multiple}"
        )


def base_digest(family: Family, pipe: Any) -> str:
    """SHA-256 over what training uses of a base: noise schedule, settings and weights.

    Of every weight 64 numbers count, with its name and shape.
    """
    models = models_of(pipe)
    others = sorted(models.keys() - {family.denoiser, "vae"})
    found = hashlib.sha256(config_hash(pipe.scheduler).encode())
    for name in (family.denoiser, *others, "vae"):
        found.update(f"{name} {config_hash(models[name])}".encode())
        for path, weight in models[name].named_parameters():
            found.update(f"{path} {tuple(weight.shape)}".encode())
            values = plain_values(weight)
            some = values[:: max(1, len(values) // 64)]
            found.update(some.float().cpu().numpy().tobytes())
    return found.hexdigest()


def method_config(config: TrainConfig, family: Family, *, text: bool = False) -> PeftConfig | None:
    """The PEFT config of `--method` for the denoiser, or for a text encoder (`text`).

    None for a method that trains the whole model.

    Raises:
        SnellaConfigError: A setting does not exist for the method, or stands in two places.
    """
    targets = list(family.text_targets if text else config.target_modules or family.targets)
    if config.target_conv and not text:
        targets += _conv_targets(family)
    given = {name: getattr(config, name) for name in _SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    more = named_values(config.method_args)
    twice = sorted(given.keys() & more.keys())
    if twice:
        raise SnellaConfigError(
            f"method_args: {', '.join(twice)} stands both there and as a setting of its own: "
            "leave one out"
        )
    if text and config.text_encoder_rank is not None:
        given["rank"] = config.text_encoder_rank
    return recipe(config.method).config(
        {**given, **more},
        targets,
        config.seed,
        "diffusion",
        chosen=bool(config.target_modules) and not text,
        steps=config.max_train_steps,
    )


def _conv_targets(family: Family) -> tuple[str, ...]:
    if not family.conv_targets:
        raise SnellaConfigError(
            f"target_conv: the family {family.name} has no list of convolutions; leave it off, or "
            f"name them in target_modules"
        )
    return family.conv_targets


# What turns on recomputing activations: in diffusers, in transformers, and there before its rename.
_CHECKPOINTING = (
    "enable_gradient_checkpointing",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
)


@dataclass(frozen=True)
class Model:
    """A base with fresh adapters on its device, ready to train.

    Attributes:
        family: How to use the base.
        pipe: Its pipeline; the components are these very modules.
        components: Adapted models by name, denoiser first, in training mode.
        objective: What the denoiser predicts.
        device: Where the denoiser is.
        base: Digest of the base before it was adapted.
        sizes: Layers and parameters, counted while every process had all of them.
        phases: Which models are on the device; work says here which phase it belongs to.
        words: New words that prompts may use.
    """

    family: Family
    pipe: Any
    components: dict[str, nn.Module]
    objective: Objective
    device: torch.device
    base: str
    sizes: "Sizes"
    phases: Phases
    words: tuple[Word, ...] = ()

    def encode_text(self, prompts: Sequence[str]) -> Conditions:
        """`Family.encode_text` of prompts that may have new words of several vectors."""
        self.phases.enter("text")
        return self.family.encode_text(self.pipe, [spelled(p, self.words) for p in prompts])

    @property
    def denoiser(self) -> nn.Module:
        return next(iter(self.components.values()))

    @property
    def text_is_frozen(self) -> bool:
        """Whether a prompt has the same embedding all through the run."""
        return len(self.components) == 1


def build_model(
    config: TrainConfig,
    device: torch.device,
    parallel: Parallel | None = None,
    selection: dict[str, Any] | None = None,
) -> Model:
    """Load the base, add the adapters of the config, bring to `device` what stays there.

    Args:
        config: Base and method.
        device: Where the run computes.
        parallel: Whether adapted models are whole or in shards; without it they are whole.
        selection: What a sensitivity pass has chosen, for methods that want it.

    Raises:
        SnellaBaseError: No such base, or no family covers it.
        SnellaConfigError: No layer matches the targets, or the method refuses its settings.
    """
    family, pipe = load_base(config)
    base = base_digest(family, pipe)
    components = add_adapters(config, family, pipe, selection)
    counted = sizes(components)
    phases = place(config, models_of(pipe), components, device, parallel)
    for model in components.values():
        model.train()
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        if config.torch_compile == "no":  # compiled code computes each layer's own
            group_small_layers(model)
    compile_denoiser(
        components[family.denoiser], config.torch_compile, config.torch_compile_backend
    )
    objective = family.objective(pipe, device, timestep_settings(config))
    words = tuple(new_words(config))
    return Model(family, pipe, components, objective, device, base, counted, phases, words)


def checkpoint_activations(model: nn.Module) -> None:
    """Have a model of diffusers or transformers compute its activations again backwards."""
    next(getattr(model, way) for way in _CHECKPOINTING if hasattr(model, way))()


def absent_parts(pipe: Any) -> tuple[str, ...]:
    """Components that this base lacks, although diffusers does not call them optional."""
    absent = (name for name, part in pipe.components.items() if part is None)
    return tuple(name for name in absent if name not in pipe._optional_components)


def size_notes(config: TrainConfig, model: Model) -> list[str]:
    """What the user should know about the resolution; nothing where it fits the base."""
    native, side = model.family.native_size(model.pipe), config.resolution
    if _SMALLEST_SHARE * native <= side <= _LARGEST_SHARE * native:
        return []
    return [
        f"resolution is {side} pixels, but the base was made for {native}: expect poor pictures, "
        f"or set resolution to about {native}"
    ]


def timestep_settings(config: TrainConfig) -> TimestepSettings:
    """Density and weight of the timesteps."""
    return TimestepSettings(
        snr_gamma=config.snr_gamma,
        weighting_scheme=config.weighting_scheme,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        mode_scale=config.mode_scale,
        shift=config.timestep_shift,
    )


def add_adapters(
    config: TrainConfig, family: Family, pipe: Any, selection: dict[str, Any] | None = None
) -> dict[str, nn.Module]:
    """Wrap the target layers; return the adapted components by name, denoiser first.

    Raises:
        SnellaConfigError: No layer matches the targets, or the pipeline cannot store this LoRA.
    """
    settings = method_config(config, family)
    if selection is not None:
        settings = replace(settings, selection=selection)  # type: ignore[type-var]
    plan = [(family.denoiser, settings)]
    if config.train_text_encoder:
        text = method_config(config, family, text=True)
        plan += [(name, text) for name in family.text_encoders if getattr(pipe, name) is not None]
    if kind_of(config.method) == "lora":
        _require_lora_places(pipe, [name for name, _ in plan])
    components: dict[str, nn.Module] = {}
    for index, (name, settings) in enumerate(plan):
        components[name] = getattr(pipe, name)
        seed_torch(config.seed, "init", index)
        try:
            _adapt(components[name], settings)
        except ValueError as error:
            raise SnellaConfigError(f"{name} cannot be adapted: {error}") from error
    components |= add_words(config, family, pipe, ADAPTER)
    for parameter in trainable_parameters(components).values():
        parameter.data = parameter.data.float()
    return components


def _require_lora_places(pipe: Any, names: Sequence[str]) -> None:
    """Refuse before the training what could not be stored after it."""
    save = getattr(type(pipe), "save_lora_weights", None)
    takes = inspect.signature(save).parameters if save else {}
    lacking = [name for name in names if f"{name}_lora_layers" not in takes]
    if lacking:
        raise SnellaConfigError(
            f"{type(pipe).__name__} of diffusers cannot store a LoRA of its {', '.join(lacking)}: "
            f"use method snella, or leave these parts as they are"
        )


def _adapt(model: nn.Module, settings: PeftConfig | None) -> None:
    if settings is None:
        model.requires_grad_(True)
    elif hasattr(model, "add_adapter"):
        model.add_adapter(settings, adapter_name=ADAPTER)  # type: ignore[operator]
    else:  # PixArt's transformer is one of the few without it
        inject_adapter_in_model(settings, model, ADAPTER)


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
    layers = [layer for _, layer in tuner_layers(components) if not isinstance(layer, TokenLayer)]
    everything = sum(p.numel() for m in components.values() for p in m.parameters())
    everything += sum(
        entries(part) - part.weight.numel()  # packed
        for model in components.values()
        for part in model.modules()
        if isinstance(part, nn.Linear)
    )
    count = sum(p.numel() for p in trainable.values())
    adapted = sum(entries(layer.get_base_layer()) for layer in layers)
    return Sizes(len(layers), count, adapted, everything - count)
