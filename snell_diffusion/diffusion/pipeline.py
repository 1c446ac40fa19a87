"""SNELLA adapters on diffusers pipelines: the verbs that `import snell_diffusion` adds as methods.

Every function takes the pipeline first and works on all of `pipe.components` that are modules, so
on any pipeline, whether diffusers gives it LoRA verbs or not. All of them check first and change
then: after an error the pipeline is what it was.
"""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.adapters import (
    LoadReport,
    adapter_names,
    load_adapter,
    read_adapter,
    save_adapter,
    state_with_header,
)
from snell_diffusion.adapters.attach import remove_adapter, uncollected
from snell_diffusion.adapters.limits import MAX_RELATIVE_UPDATE
from snell_diffusion.adapters.state import layer_tensors
from snell_diffusion.adapters.tokens import remove_tokens, require_removable, words_of
from snell_diffusion.diffusion.attention import processors_off
from snell_diffusion.diffusion.loaded import (
    Weight,
    as_list,
    chosen_components,
    free_name,
    fused_names,
    keep_notes,
    kept_notes,
    models_of,
    one_name,
    opened,
    require_loaded,
    require_names,
    require_unfused,
    strengths_of,
    tokenizers_of,
)
from snell_diffusion.diffusion.sources import cache_label, locate
from snell_diffusion.errors import SnellaKeyError, SnellaValueError, shown
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.base import warn_about_merge_error
from snell_diffusion.tuners.qkv_guard import guard_saving, is_fused
from snell_diffusion.tuners.tokens import Word, spelled

__all__ = [
    "delete_snella_adapters",
    "disable_snella",
    "enable_snella",
    "fuse_snella",
    "get_active_snella_adapters",
    "get_list_snella_adapters",
    "load_snella_weights",
    "release_snella_cache",
    "save_snella_weights",
    "set_snella_adapters",
    "set_snella_sparsity",
    "snella_state_dict",
    "unfuse_snella",
    "unload_snella_weights",
]

Source = str | os.PathLike[str] | Mapping[str, Any]


@uncollected()
def load_snella_weights(
    pipe: Any,
    source: Source,
    adapter_name: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    force_download: bool | None = None,
    allow_other_base: bool = False,
    max_relative_update: float = MAX_RELATIVE_UPDATE,
) -> LoadReport:
    """Load an adapter and make it the only active SNELLA adapter; ends `disable_snella`.

    Args:
        source: A `.safetensors` file, a folder, "owner/name" on the hub, or a state dict (as of
            `snella_state_dict`, or the bare tensors of a file).
        adapter_name: Up to 64 letters, digits, "_" and "-"; default "default_0", "default_1", ...
        weight_name: File in a folder or repository; default `pytorch_snella_weights.safetensors`.
        subfolder: Folder below the folder or repository.
        revision, token, cache_dir, local_files_only, force_download: For the hub, as in
            `huggingface_hub.hf_hub_download`.
        allow_other_base: Load an adapter that was trained on a base with another class or other
            settings, provided that every layer is there with the same shape.
        max_relative_update: Largest accepted |ΔW| / |W| of any layer (Frobenius norms).

    Returns:
        What was loaded.

    Raises:
        SnellaError: The subclass says what is wrong: the file, a name, a shape, a value, the base.
            Nothing has been touched then.
    """
    if isinstance(source, Mapping):
        file = read_adapter(source)
    else:
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        path = locate(source, weight_name, subfolder, **hub)
        file = read_adapter(path, cache_label(path))
    words = file.header.tokens
    if words is not None:
        # First, since a warning can be an error.
        _warn_about_spelling(pipe, words_of(words))
    with opened(pipe) as models:
        name = adapter_name if adapter_name is not None else free_name(models)
        report = load_adapter(
            models, file, name, allow_other_base, max_relative_update, tokenizers_of(pipe)
        )
        keep_notes(models, name, file.header.metadata)
        for component in {*report.layers, *(words.encoders if words else ())}:
            guard_saving(models[component])
        # Layers that were there stay off after disable_snella, new ones start on.
        _switch_layers(models, True)
        return report


def save_snella_weights(
    pipe: Any,
    save_directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    weight_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save one loaded adapter, with the sparsity levels it has now.

    Args:
        save_directory: A folder, or a `.safetensors` file.
        adapter_name: Default: the only one there is.
        weight_name: File name in the folder.
        metadata: Numbers and texts for the header, e.g. {"instance_prompt": "a sks cat"}; default
            those of the file the adapter was loaded from.
        dtype: Storage of the factors: float32 (default), float16 or bfloat16.

    Returns:
        The file.

    Raises:
        SnellaKeyError: No adapter of that name, or several and none named.
        SnellaError: As `snell_diffusion.adapters.save_adapter`.
    """
    with opened(pipe) as models:
        name = one_name(models, adapter_name)
        target = Path(save_directory) / weight_name if weight_name else save_directory
        notes = kept_notes(models, name) if metadata is None else metadata
        return save_adapter(target, models, name, notes, _origin(pipe), dtype)


def snella_state_dict(pipe: Any, adapter_name: str | None = None) -> dict[str, Tensor | str]:
    """One adapter as a dict that `load_snella_weights` takes: its tensors, and its header's text.

    Raises:
        SnellaKeyError: No adapter of that name, or several and none named.
    """
    with opened(pipe) as models:
        name = one_name(models, adapter_name)
        return state_with_header(models, name, kept_notes(models, name))


def unload_snella_weights(pipe: Any, adapter_name: str | None = None) -> None:
    """Take out all SNELLA adapters, or one; with the last one every module is the stock one again.

    What is fused is unfused first.

    Raises:
        SnellaKeyError: No adapter of that name.
        SnellaValueError: One adapter is to go while others are fused, or QKV projections are fused.
    """
    with opened(pipe) as models:
        names = adapter_names(models) if adapter_name is None else [adapter_name]
        require_names(models, names)
        require_removable(models, tokenizers_of(pipe), names)
        if fused_names(models):
            if adapter_name is not None:
                require_unfused(models, f"unload {adapter_name!r}")
            _unfuse(models)
        _take_out(pipe, models, names)


def delete_snella_adapters(pipe: Any, adapter_names: str | Sequence[str]) -> None:
    """Take out adapters by name.

    Raises:
        SnellaKeyError: A name is not loaded; none is deleted then.
        SnellaValueError: Something is fused.
    """
    names = as_list(adapter_names)
    with opened(pipe) as models:
        require_names(models, names)
        require_removable(models, tokenizers_of(pipe), names)
        require_unfused(models, "delete adapters")
        _take_out(pipe, models, names)


def set_snella_adapters(
    pipe: Any, names: str | Sequence[str], weights: Weight | Sequence[Weight] = None
) -> None:
    """Make these adapters active, at these strengths; all other SNELLA adapters become inactive.

    Args:
        names: One name or several; updates of several add up.
        weights: One strength for all or one for each: a number, {component: number}, or None for
            1. A component that is not in a dict gets 1.

    Raises:
        SnellaKeyError: A name or component is not there.
        SnellaValueError: Numbers that are not finite or too few; or something is fused.
    """
    models = models_of(pipe)
    active = as_list(names)
    with processors_off(*models.values()):
        require_names(models, active)
        strengths = strengths_of(models, active, weights)
        require_unfused(models, "change the active adapters")
        for component, model in models.items():
            for _, layer in delta_layers(model):
                layer.set_adapter(active, inference_mode=True)
                for name in active:
                    layer.set_scale(name, strengths[name][component])


def get_active_snella_adapters(pipe: Any) -> list[str]:
    """Names of the active SNELLA adapters, also while `disable_snella` has switched them off."""
    models = models_of(pipe)
    active: dict[str, None] = {}
    with processors_off(*models.values()):
        for model in models.values():
            for _, layer in delta_layers(model):
                active |= dict.fromkeys(n for n in layer.active_adapters if n in layer.configs)
    return list(active)


def get_list_snella_adapters(pipe: Any) -> dict[str, list[str]]:
    """Names of the loaded SNELLA adapters by component, in the order they were loaded."""
    models = models_of(pipe)
    with processors_off(*models.values()):
        found = {name: adapter_names({name: model}) for name, model in models.items()}
    return {component: names for component, names in found.items() if names}


def enable_snella(pipe: Any) -> None:
    """Switch the active SNELLA adapters on again after `disable_snella`.

    Raises:
        SnellaKeyError: None is loaded.
    """
    _switch(pipe, True)


def disable_snella(pipe: Any) -> None:
    """Switch all SNELLA adapters off without taking them out: pictures are the base model's.

    Raises:
        SnellaKeyError: None is loaded.
        SnellaValueError: Something is fused.
    """
    _switch(pipe, False)


def fuse_snella(
    pipe: Any,
    scale: float = 1.0,
    components: Sequence[str] | None = None,
    adapter_names: str | Sequence[str] | None = None,
    safe: bool = True,
) -> dict[str, float]:
    """Add the updates to the base weights. `unfuse_snella` restores those bit for bit.

    Args:
        scale: Factor on all updates, for this fusion only: adapters keep their own strength.
        components: Which components; default all that have an adapter.
        adapter_names: Which adapters; default the active ones.
        safe: Refuse, before anything is changed, weights that would not be finite.

    Returns:
        By component, the largest share of a layer's update that rounding to the base's dtype lost.

    Raises:
        SnellaKeyError: No such adapter or component, or nothing to fuse.
        SnellaValueError: Already fused, switched off, quantized, or not finite.
    """
    if not math.isfinite(scale):
        raise SnellaValueError(f"scale must be a finite number, got {scale}")
    with opened(pipe) as models:
        require_loaded(models)
        require_unfused(models, "fuse again")
        chosen = chosen_components(models, components)
        names = get_active_snella_adapters(pipe) if adapter_names is None else adapter_names
        names = as_list(names)
        require_names(models, names)
        layers = [
            (component, layer)
            for component, model in chosen.items()
            for _, layer in delta_layers(model)
            if any(name in layer.configs for name in names)
        ]
        _merge([layer for _, layer in layers], names, scale, safe)
        for model in chosen.values():
            warn_about_merge_error(model)
        errors: dict[str, float] = {}
        for component, layer in layers:
            worst = max(layer.merge_error.values())
            errors[component] = max(errors.get(component, 0.0), worst)
        return errors


def unfuse_snella(pipe: Any, components: Sequence[str] | None = None) -> None:
    """Restore the base weights bit for bit; the adapters act as they did before `fuse_snella`.

    Raises:
        SnellaKeyError: No such component.
        SnellaValueError: Nothing is fused, or QKV projections are.
    """
    with opened(pipe) as models:
        chosen = chosen_components(models, components)
        if not fused_names(chosen):
            raise SnellaValueError(
                f"nothing is fused in {shown(chosen) or 'this pipeline'}; call fuse_snella() first"
            )
        _unfuse(chosen)


def release_snella_cache(pipe: Any) -> None:
    """Release the weights that adapted layers keep to be as fast as the base's.

    They are one copy of each adapted weight on its device, computed at the first call and again at
    the next one. `snell_diffusion.tuners.DeltaLayer.cache_in_eval = False` keeps none from the
    start; `fuse_snella` is as fast without them.
    """
    models = models_of(pipe)
    with processors_off(*models.values()):
        for model in models.values():
            for _, layer in delta_layers(model):
                layer.clear_cache()


def set_snella_sparsity(
    pipe: Any, level: float | None, adapter_name: str | Sequence[str] | None = None
) -> None:
    """Re-threshold loaded adapters: one share of zeros for every layer, at inference time.

    Args:
        level: 0 (every layer's full update) to 1 (no update); None restores, bit for bit, the
            levels the adapter was loaded with.
        adapter_name: One or several; default all that are loaded.

    Raises:
        SnellaKeyError: None loaded, or a name that is not.
        SnellaValueError: A level out of range, an adapter that has no levels, or one that is fused.
    """
    if level is not None and not (isinstance(level, (int, float)) and 0.0 <= level <= 1.0):
        raise SnellaValueError(f"level must be 0 (dense) to 1 (no update) or None, got {level!r}")
    with opened(pipe) as models:
        require_loaded(models)
        names = adapter_names(models) if adapter_name is None else as_list(adapter_name)
        require_names(models, names)
        require_unfused(models, "change the sparsity")
        layers = [
            (layer, name)
            for model in models.values()
            for _, layer in delta_layers(model)
            for name in names
            if name in layer.configs and hasattr(layer, "set_sparsity")
        ]
        without = set(names) - {name for _, name in layers}
        if without and (adapter_name is not None or not layers):
            raise SnellaValueError(
                f"adapter(s) {shown(without)} are of a method without sparsity levels: only SNELLA "
                "and SNELL have them"
            )
        for layer, name in layers:
            if level and layer.configs[name].sparsify == "none":
                raise SnellaValueError(
                    f"adapter {name!r} was trained with sparsify='none', which keeps every entry: "
                    "its level can only be 0"
                )
        for layer, name in layers:
            _set_level(layer, name, level)


def _set_level(layer: Any, name: str, level: float | None) -> None:
    trained = layer.trained_sparsity
    if level is not None:
        stored = layer_tensors(layer, name)
        kept = {
            short: tensor.clone()
            for short, tensor in stored.items()
            if short.endswith(("_sparsity", "_threshold"))
        }
        trained.setdefault(name, kept)
        layer.set_sparsity(name, float(level))
    elif name in trained:
        for short, tensor in trained.pop(name).items():
            layer_tensors(layer, name)[short].copy_(tensor)
        layer.reread(name)


def _take_out(pipe: Any, models: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    for name in names:
        remove_tokens(models, tokenizers_of(pipe), name)
        for model in models.values():
            remove_adapter(model, name)


def _warn_about_spelling(pipe: Any, words: Sequence[Word]) -> None:
    """Tell how to write words of several vectors where the pipeline does not expand them itself."""
    several = [word for word in words if word.vectors > 1]
    if several and not hasattr(pipe, "maybe_convert_prompt"):
        written = "; ".join(f"{word.text} as '{spelled(word.text, [word])}'" for word in several)
        warnings.warn(
            f"{type(pipe).__name__} does not expand words of several vectors: write {written} in "
            "its prompts",
            stacklevel=4,
        )


def _switch(pipe: Any, on: bool) -> None:
    models = models_of(pipe)
    with processors_off(*models.values()):
        require_loaded(models)
        if not on:
            require_unfused(models, "switch adapters off")
        _switch_layers(models, on)


def _switch_layers(models: Mapping[str, nn.Module], on: bool) -> None:
    for model in models.values():
        for _, layer in delta_layers(model):
            active = layer.active_adapters
            layer.enable_adapters(on)
            layer.set_adapter(active, inference_mode=True)


def _merge(layers: list[Any], names: list[str], scale: float, safe: bool) -> None:
    if any(layer.disable_adapters for layer in layers):
        raise SnellaValueError("the adapters are switched off: call enable_snella() before fusing")
    if not layers:
        raise SnellaKeyError(f"no layer has an adapter named {shown(names) or '(none is active)'}")
    done = []
    try:
        for layer in layers:
            layer.scale_layer(scale)
            try:
                layer.merge(safe_merge=safe, adapter_names=names)
            finally:
                layer.unscale_layer(scale)
            done.append(layer)
    except ValueError as error:
        for layer in done:
            layer.unmerge()
        raise SnellaValueError(f"{error} (no layer was fused)") from error


def _unfuse(models: Mapping[str, nn.Module]) -> None:
    for component, model in models.items():
        if is_fused(model):
            raise SnellaValueError(
                f"{component}: the fused updates are also in its fused QKV projections: call "
                "unfuse_qkv_projections() first"
            )
    for model in models.values():
        for _, layer in delta_layers(model):
            if layer.merged:
                layer.unmerge()


def _origin(pipe: Any) -> dict[str, str | None]:
    """Pipeline class and base name for the header."""
    source = str(getattr(pipe, "name_or_path", None) or "") or None
    return {"pipeline": type(pipe).__name__, "source": source}
