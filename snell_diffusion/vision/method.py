"""Puts a method into a base: adapters by the recipes of `tuners`, or only a head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.training.adapter_tensors import trainable_parameters, tuner_layers
from snell_diffusion.training.randomness import seed_torch
from snell_diffusion.tuners.grouping import group_small_layers
from snell_diffusion.tuners.recipes import RECIPES, Recipe, list_methods, recipe
from snell_diffusion.tuners.snella_config import VISION, SnellaConfig
from snell_diffusion.vision.config import VisionConfig
from snell_diffusion.vision.loading import Base
from snell_diffusion.vision.models import HEAD
from snell_diffusion.vision.placement import place_backbone, place_branches

ADAPTER = "default"
COMPONENT = "vit"
"""Name of the adapted model in files and logs, whatever its family."""
LINEAR_PROBE = "linear_probe"
Choose = Callable[[PeftConfig], PeftConfig]
_LEVELS = ("target_sparsity", "init_sparsity")


@dataclass(frozen=True)
class Sizes:
    """How much is adapted and trained.

    Attributes:
        layers: Wrapped layers.
        adapter: Trained numbers in the base and its adapters; the head is not among them.
        head: Numbers of the head.
        base: Numbers of the base, head left out.
        extras: Trained numbers of the base itself, such as the class token, stored with the head.
    """

    layers: int
    adapter: int
    head: int
    base: int
    extras: int

    @property
    def trainable(self) -> int:
        """All trained numbers."""
        return self.adapter + self.head


def method_names() -> list[str]:
    """Every value of `method`."""
    return [*RECIPES, LINEAR_PROBE]


def methods_table() -> str:
    """The table of `--list-methods`."""
    return f"{list_methods()}\n{LINEAR_PROBE}  only the new head, on frozen features"


def find_recipe(name: str) -> Recipe | None:
    """The recipe of a method; None for the linear probe.

    Raises:
        SnellaConfigError: No such method; lists them.
    """
    if name == LINEAR_PROBE:
        return None
    if name not in RECIPES:
        known = shown(method_names(), 40)
        raise SnellaConfigError(f"method '{name}' is unknown; known: {known}")
    return recipe(name)


def level_setting(name: str) -> str:
    """The setting of a method that `levels` vary.

    Raises:
        SnellaConfigError: The method has no sparsity level.
    """
    found = find_recipe(name)
    settings = [] if found is None else found.settings
    for setting in _LEVELS:
        if setting in settings:
            return setting
    raise SnellaConfigError(f"levels: method {name} has no sparsity level to search")


def method_config(config: VisionConfig, base: Base, steps: int) -> PeftConfig | None:
    """The PEFT config of a run; None for methods without adapter.

    Args:
        config: The run.
        base: What is adapted.
        steps: Optimizer steps of the run.

    Raises:
        SnellaConfigError: The method is unknown, refuses a setting, or has no place in the base.
    """
    found = find_recipe(config.method)
    given: dict[str, Any] = {"rank": config.rank, "update_scale": config.update_scale}
    if not placed_as_published(config):
        # A default of the protocol, which methods without dropout need not know.
        known = config.protocol != "paper" or (found is not None and "dropout" in found.settings)
        given["dropout"] = config.dropout if known else None
    given = {name: value for name, value in given.items() if value is not None}
    given |= config.method_settings
    if found is None:
        if given:
            raise SnellaConfigError(f"method {LINEAR_PROBE} has no {shown(given)}")
        return None
    lacks = None if config.target_modules else found.lacks(_linears(base))
    if lacks is not None:
        raise SnellaConfigError(
            f"{found.name} adapts {lacks}; {type(base.model).__name__} has none by a usual name; "
            f"name others with target_modules"
        )
    if config.protocol == "paper" and issubclass(_kind(found), SnellaConfig):
        given = {**_published(found), **given}
    return found.config(
        given,
        config.target_modules or _present(base),
        config.seed,
        "vision",
        chosen=bool(config.target_modules),
        steps=steps,
    )


def placed_as_published(config: VisionConfig) -> bool:
    """Whether dropout is that of the public SNELL code, see placement.py: for its own methods."""
    found = find_recipe(config.method)
    if config.protocol != "paper" or found is None:
        return False
    return issubclass(_kind(found), (SnellaConfig, LoraConfig))


def _present(base: Base) -> list[str]:
    """The family's targets in the spelling of this model."""
    linears = [f".{name}" for name in _linears(base)]
    return [
        ending for ending in base.family.targets if any(n.endswith(f".{ending}") for n in linears)
    ]


def _linears(base: Base) -> list[str]:
    return [name for name, part in base.model.named_modules() if isinstance(part, nn.Linear)]


def _kind(found: Recipe) -> type:
    return found.kind or object


def _published(found: Recipe) -> dict[str, Any]:
    """What the public code has for the settings that ours for vision changes."""
    names = {field: name for name, field in found.shared.items()}
    paper = SnellaConfig.paper()
    values = {names.get(field, field): getattr(paper, field) for field in VISION}
    return {name: value for name, value in values.items() if name in found.settings}


def adapt(config: VisionConfig, base: Base, steps: int, choose: Choose) -> Sizes:
    """Make the parts of a base trainable that a method trains, and its head.

    Args:
        config: The run.
        base: As loaded; its model is changed in place.
        steps: Optimizer steps of the run.
        choose: Completes the settings of a method that looks at gradients first.

    Raises:
        SnellaConfigError: No layer matches, or the method refuses its settings.
    """
    model = base.model
    settings = method_config(config, base, steps)
    size = sum(p.numel() for p in model.parameters())
    extras = base.family.extras(model) if config.train_cls_token else []
    place_backbone(base.family.branches(model), config.backbone_drop_path or 0.0)
    if settings is not None:
        inject(model, choose(settings), config.seed)
        _refuse_maps(config.method, base)
    elif config.method != LINEAR_PROBE:
        model.requires_grad_(True)
    getattr(model, HEAD).requires_grad_(True)
    for name in extras:
        model.get_parameter(name).requires_grad_(True)
    for parameter in trainable_parameters({COMPONENT: model}).values():
        parameter.data = parameter.data.float()
    published = config.dropout if placed_as_published(config) else None
    place_branches(model, published or 0.0, config.drop_path or 0.0)
    if not (published or config.drop_path):  # else layers are asked twice in a pass
        group_small_layers(model)
    if config.gradient_checkpointing:
        _checkpoint_activations(base)
    return _sizes(model, size, extras)


def _refuse_maps(method: str, base: Base) -> None:
    """Refuse a method that takes the maps which a wrapped Linear reads for a convolution's."""
    found = find_recipe(method)
    if found is None or found.maps or not base.family.maps:
        return
    for name, layer in tuner_layers({COMPONENT: base.model}):
        if isinstance(layer.get_base_layer(), nn.Linear) and name != f"{COMPONENT}.{HEAD}":
            raise SnellaConfigError(
                f"method {method} cannot adapt {name}: it takes every input of four axes for a "
                f"convolution's [B, C, H, W], and Linear layers of {base.family.name} read "
                f"[B, H, W, C]; use another method, such as hra or lora"
            )


def _checkpoint_activations(base: Base) -> None:
    """Have the blocks compute their activations again backwards."""
    ways = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # before its rename
    way = next(getattr(base.model, name) for name in ways if hasattr(base.model, name))
    try:
        way({"use_reentrant": False})
    except ValueError as error:
        raise SnellaConfigError(
            f"gradient_checkpointing: {base.family.name} of transformers has none; leave it off"
        ) from error


def inject(model: nn.Module, settings: PeftConfig, seed: int) -> None:
    """Wrap the target layers.

    Raises:
        SnellaConfigError: No layer matches the targets, or the method refuses the model.
    """
    seed_torch(seed, "init", 0)
    try:
        inject_adapter_in_model(settings, model, ADAPTER)
    except ValueError as error:
        raise SnellaConfigError(f"{type(model).__name__} cannot be adapted: {error}") from error


def _sizes(model: nn.Module, size: int, extras: list[str]) -> Sizes:
    head = sum(p.numel() for p in getattr(model, HEAD).parameters())
    trained = trainable_parameters({COMPONENT: model})
    layers = len(list(tuner_layers({"": model})))
    return Sizes(
        layers=layers,
        adapter=sum(p.numel() for p in trained.values()) - head,
        head=head,
        base=size - head,
        extras=sum(model.get_parameter(name).numel() for name in extras),
    )


def kept_beside(model: nn.Module, extras: list[str]) -> dict[str, torch.Tensor]:
    """What is stored beside an adapter: head and trained parts of the base, by their paths."""
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{HEAD}.")]
    return {name: model.get_parameter(name).detach() for name in (*names, *extras)}
