"""What is loaded on a pipeline, and the checks that its verbs share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from snell_diffusion.adapters import adapter_names
from snell_diffusion.diffusion.attention import processors_off
from snell_diffusion.diffusion.offload import offload_off
from snell_diffusion.errors import SnellaKeyError, SnellaValueError, shown
from snell_diffusion.tuners import delta_layers

Weight = float | Mapping[str, float] | None
"""One strength for every component, one by component, or None for 1."""

_NOTES = "snella_file_metadata"


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def tokenizers_of(pipe: Any) -> dict[str, Any]:
    """The tokenizers of a pipeline by component."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith("tokenizer") and part is not None}


@contextmanager
def opened(pipe: Any) -> Iterator[dict[str, nn.Module]]:
    """A pipeline's models with tuner layers in place and all weights in memory, by component."""
    models = models_of(pipe)
    with offload_off(*models.values()), processors_off(*models.values()):
        yield models


def chosen_components(
    models: Mapping[str, nn.Module], components: Sequence[str] | None
) -> dict[str, nn.Module]:
    """The models of some components, or of all.

    Raises:
        SnellaKeyError: A component that is not there.
    """
    if components is None:
        return dict(models)
    wanted = as_list(components)
    unknown = set(wanted) - set(models)
    if unknown:
        raise SnellaKeyError(f"no component {shown(unknown)}; this pipeline has {shown(models)}")
    return {name: models[name] for name in wanted}


def as_list(names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def free_name(models: Mapping[str, nn.Module]) -> str:
    """The first of default_0, default_1, ... that no tuner uses."""
    taken = {
        *adapter_names(models),
        *(name for model in models.values() for name in getattr(model, "peft_config", None) or ()),
    }
    return next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)


def one_name(models: Mapping[str, nn.Module], name: str | None) -> str:
    """The adapter that is meant: the one named, or the only one there is.

    Raises:
        SnellaKeyError: Not loaded, or none named and not exactly one loaded.
    """
    names = adapter_names(models)
    if name is None and len(names) != 1:
        raise SnellaKeyError(
            f"{len(names)} SNELLA adapters are loaded ({shown(names) or 'none'}): "
            "name the one that is meant by adapter_name"
        )
    if name is not None:
        require_names(models, [name])
    return names[0] if name is None else name


def require_names(models: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Refuse names of adapters that are not loaded."""
    there = adapter_names(models)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise SnellaKeyError(
            f"no SNELLA adapter named {shown(unknown)}; loaded: {shown(there) or 'none'}"
        )


def require_loaded(models: Mapping[str, nn.Module]) -> None:
    """Refuse a pipeline without any adapter."""
    if not adapter_names(models):
        raise SnellaKeyError("no SNELLA adapter is loaded: call load_snella_weights first")


def keep_notes(models: Mapping[str, nn.Module], name: str, notes: Mapping[str, Any]) -> None:
    """Let a file's metadata stay with its adapter, until it is unloaded or saved again."""
    for model in models.values():
        for _, layer in delta_layers(model, name):
            # On the config, because that is copied and removed with the adapter.
            vars(layer.configs[name])[_NOTES] = dict(notes)


def kept_notes(models: Mapping[str, nn.Module], name: str) -> dict[str, Any]:
    """The metadata of the file an adapter came from; empty if it came from none."""
    for model in models.values():
        for _, layer in delta_layers(model, name):
            return dict(vars(layer.configs[name]).get(_NOTES, {}))
    return {}


def fused_names(models: Mapping[str, nn.Module]) -> list[str]:
    """Names of the adapters that are merged into some layer; repeated by layer."""
    return [
        name
        for model in models.values()
        for _, layer in delta_layers(model)
        for name in layer.merged_adapters
    ]


def require_unfused(models: Mapping[str, nn.Module], what: str) -> None:
    """Refuse to do `what` while anything is fused."""
    fused = fused_names(models)
    if fused:
        raise SnellaValueError(
            f"cannot {what} while {shown(set(fused))} is fused into the weights: "
            "call unfuse_snella() first"
        )


def strengths_of(
    models: Mapping[str, nn.Module],
    names: Sequence[str],
    weights: Weight | Sequence[Weight],
) -> dict[str, dict[str, float]]:
    """Strength by adapter and component, from what `set_snella_adapters` was given.

    Raises:
        SnellaKeyError: A component that is not there.
        SnellaValueError: Numbers that are not finite, or not one for each name.
    """
    single = weights is None or isinstance(weights, (int, float, Mapping))
    each = [weights] * len(names) if single else list(weights)  # type: ignore[arg-type]
    if len(each) != len(names):
        raise SnellaValueError(f"{len(names)} adapters, but {len(each)} weights: {each}")
    return {
        name: _by_component(models, weight)  # type: ignore[arg-type]
        for name, weight in zip(names, each, strict=True)
    }


def _by_component(models: Mapping[str, nn.Module], weight: Weight) -> dict[str, float]:
    given = weight if isinstance(weight, Mapping) else dict.fromkeys(models, weight)
    unknown = set(given) - set(models)
    if unknown:
        raise SnellaKeyError(f"no component {shown(unknown)}; this pipeline has {shown(models)}")
    numbers = {name: 1.0 if given.get(name) is None else given[name] for name in models}
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise SnellaValueError(f"weight for {name} must be a finite number, got {number!r}")
    return {name: float(number) for name, number in numbers.items()}  # type: ignore[arg-type]
