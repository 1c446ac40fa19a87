"""What a run left, whatever its method, into a pipeline and out again.

Adapters of ours are loaded by `load_snella_weights`, LoRA and DoRA by diffusers. This file holds
the two other kinds: PEFT's other methods (their tensors by PEFT's own names, the settings as JSON
in the file's metadata), and whole trained models.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snell_diffusion.diffusion.loaded import models_of
from snell_diffusion.diffusion.run_folder import ADAPTER_FILES
from snell_diffusion.errors import (
    SnellaError,
    SnellaFileError,
    SnellaKeyError,
    SnellaShapeError,
    shown,
)
from snell_diffusion.training.files import write_with
from snell_diffusion.tuners.peft_state import fill_peft_adapter
from snell_diffusion.tuners.recipes import RECIPES, quiet_sparse
from snell_diffusion.tuners.traverse import innermost

__all__ = ["attach", "save_foreign"]

# One entry: the order of several in a file is left to chance, and equal runs give equal files.
_METADATA = "snell_diffusion.run"
_ADAPTER = "default"
Detach = Callable[[], None]


def save_foreign(method: str, components: Mapping[str, nn.Module], path: Path) -> None:
    """Write the adapters of a PEFT method, or whole trained models, to one file, atomically.

    Tensors are named `<component>.<name>`: PEFT's names for adapters, else the parameters' own.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for component, model in components.items():
        settings = getattr(model, "peft_config", {}).get(_ADAPTER)
        if settings is not None:
            found = get_peft_model_state_dict(model, adapter_name=_ADAPTER)
            configs[component] = _plain(settings)
        elif RECIPES[method].trains_base:
            found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        else:
            continue
        for name, tensor in found.items():
            tensors[f"{component}.{name}"] = tensor.detach().to("cpu").contiguous().clone()
    metadata = {_METADATA: json.dumps({"method": method, "configs": configs})}
    write_with(path, lambda file: save_file(tensors, file, metadata))


def _plain(settings: PeftConfig) -> dict[str, Any]:
    """The settings that differ from the class's own, as JSON values."""
    found = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if item.name in ("peft_type", "runtime_config", "auto_mapping", "inference_mode"):
            continue
        value = sorted(value) if isinstance(value, set) else value
        if value != item.default and isinstance(value, (str, int, float, bool, list)):
            found[item.name] = value
    return found


def attach(pipe: Any, source: str | os.PathLike[str]) -> Detach:
    """Put the result of a run into a pipeline of its base.

    Args:
        pipe: A diffusers pipeline.
        source: A run folder, or the file in it.

    Returns:
        A function that takes it out again and leaves the pipeline as it was.

    Raises:
        SnellaError: No result of a run, or it does not fit this pipeline; nothing was changed.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ADAPTER_FILES.values() if (path / name).is_file()]
        if len(found) != 1:
            raise SnellaFileError(
                f"{path}: expected one of {shown(ADAPTER_FILES.values())}, got "
                f"{shown(file.name for file in found) or 'none of them'}; give the file itself"
            )
        (path,) = found
    if path.name == ADAPTER_FILES["lora"]:
        pipe.load_lora_weights(str(path))
        return lambda: pipe.unload_lora_weights()
    if path.name == ADAPTER_FILES["ours"]:
        report = pipe.load_snella_weights(str(path))
        return lambda: pipe.delete_snella_adapters(report.adapter_name)
    method, configs, tensors = _read(path)
    models = models_of(pipe)
    parts = _by_component(tensors, models, path)
    if RECIPES[method].trains_base:
        return _replace_weights(models, parts, path)
    return _inject(method, models, configs, parts, path)


def _read(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SnellaFileError(f"{path}: cannot be read as safetensors: {error}") from error
    try:
        about = json.loads(metadata.get(_METADATA, "null"))
    except ValueError as error:
        raise SnellaFileError(f"{path}: metadata {_METADATA!r} is no JSON: {error}") from error
    about = about if isinstance(about, dict) else {}
    method, configs = about.get("method"), about.get("configs")
    known = isinstance(method, str) and method in RECIPES and not RECIPES[method].ours
    if not known:
        raise SnellaFileError(
            f"{path}: expected the weights of a run (metadata {_METADATA!r}), got method "
            f"{method!r:.80}; load LoRA files with load_lora_weights and ours with "
            "load_snella_weights"
        )
    if not isinstance(configs, dict) or not all(isinstance(v, dict) for v in configs.values()):
        raise SnellaFileError(f"{path}: metadata {_METADATA!r}: expected settings by component")
    return str(method), configs, tensors


def _by_component(
    tensors: Mapping[str, Tensor], models: Mapping[str, nn.Module], path: Path
) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition(".")
        if component not in models:
            raise SnellaKeyError(
                f"{path}: tensor {name[:200]!r} is for {component!r}, which this pipeline does not "
                f"have ({shown(models)}): use the base it was trained on"
            )
        parts.setdefault(component, {})[rest] = tensor
    return parts


def _replace_weights(
    models: Mapping[str, nn.Module], parts: Mapping[str, Mapping[str, Tensor]], path: Path
) -> Detach:
    live: dict[str, dict[str, nn.Parameter]] = {}
    for component, values in parts.items():
        live[component] = dict(models[component].named_parameters())
        for name, value in values.items():
            there = live[component].get(name)
            if there is None or there.shape != value.shape:
                raise SnellaShapeError(
                    f"{path}: {component}.{name}: expected "
                    f"{'no such weight' if there is None else list(there.shape)} as in this "
                    f"pipeline, got {list(value.shape)}: use the base it was trained on"
                )
            if not bool(torch.isfinite(value.float()).all()):
                raise SnellaFileError(f"{path}: {component}.{name} holds NaN or infinite values")
    before: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def detach() -> None:
        for parameter, value in before:
            parameter.copy_(value)
        before.clear()

    with torch.no_grad():
        for component, values in parts.items():
            for name, value in values.items():
                parameter = live[component][name]
                before.append((parameter, parameter.detach().to("cpu", copy=True)))
                parameter.copy_(value)
    return detach


def _inject(
    method: str,
    models: Mapping[str, nn.Module],
    configs: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Mapping[str, Tensor]],
    path: Path,
) -> Detach:
    kind = RECIPES[method].kind
    assert kind is not None
    known = {item.name for item in dataclasses.fields(kind)}
    done: list[nn.Module] = []

    def detach() -> None:
        for model in done:
            _strip(model)
        done.clear()

    for component, values in parts.items():
        given = configs.get(component, {})
        strange = sorted(set(given) - known)
        if strange or component not in configs:
            raise SnellaFileError(
                f"{path}: settings of {component!r}: expected those of method {method}, got "
                f"{shown(strange) or 'none'}"
            )
        model = models[component]
        if getattr(model, "peft_config", None):
            raise SnellaKeyError(
                f"{component} has adapters already: take them out before attaching {path.name}"
            )
        try:
            done.append(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quiet_sparse()
                inject_adapter_in_model(kind(**given), model, _ADAPTER)
                fill_peft_adapter(model, values, _ADAPTER, f"{path}: {component}")
        except SnellaError:
            detach()
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            detach()
            raise SnellaFileError(f"{path}: {component} does not take it: {error}") from error
        except BaseException:
            detach()
            raise
        model.requires_grad_(False).eval()
    return detach


def _strip(model: nn.Module) -> None:
    """Put the modules that PEFT has wrapped back in their places."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, innermost(child))
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(model):
            delattr(model, attribute)
