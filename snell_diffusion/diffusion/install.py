"""Adds the SNELLA verbs to `DiffusionPipeline`, at once or as soon as diffusers gets imported.

The logic lives in the plain functions of `snell_diffusion.diffusion.pipeline`; a method added here
only forwards to the function of the same name. Nothing that exists is ever replaced. Set the
environment variable SNELL_DIFFUSION_NO_METHODS=1 to leave diffusers alone.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PIPELINE_MODULE = "diffusers.pipelines.pipeline_utils"

VERBS = {
    "load_snella_weights": "Load a SNELLA adapter from a file, folder, hub id or state dict.",
    "save_snella_weights": "Save one loaded SNELLA adapter as a single safetensors file.",
    "snella_state_dict": "One loaded SNELLA adapter as a state dict that can be loaded again.",
    "unload_snella_weights": "Remove one or all SNELLA adapters and their layers.",
    "fuse_snella": "Merge active SNELLA adapters into the base weights; undone by unfuse_snella.",
    "unfuse_snella": "Restore the base weights bit for bit and switch the adapters on again.",
    "set_snella_adapters": "Choose the active SNELLA adapters and their strengths.",
    "get_active_snella_adapters": "Names of the active SNELLA adapters.",
    "get_list_snella_adapters": "Names of the loaded SNELLA adapters, by component.",
    "delete_snella_adapters": "Remove SNELLA adapters by name.",
    "enable_snella": "Switch the active SNELLA adapters on.",
    "disable_snella": "Switch all SNELLA adapters off without unloading them.",
    "release_snella_cache": "Release the weights that adapted layers keep between calls.",
    "set_snella_sparsity": "Re-threshold loaded SNELLA adapters; None restores trained levels.",
}


def _verb(name: str, summary: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        from snell_diffusion.diffusion import pipeline

        return getattr(pipeline, name)(self, *args, **kwargs)

    method.__name__ = name
    method.__qualname__ = f"DiffusionPipeline.{name}"
    method.__doc__ = f"{summary} See `snell_diffusion.diffusion.pipeline.{name}`."
    method.__module__ = __name__
    return method


def add_methods(pipeline_class: type) -> list[str]:
    """Put the verbs on a pipeline class; returns the names added. What is there stays as it is."""
    missing = [name for name in VERBS if not hasattr(pipeline_class, name)]
    for name in missing:
        setattr(pipeline_class, name, _verb(name, VERBS[name]))
    return missing


def remove_methods(pipeline_class: type) -> list[str]:
    """Take the verbs of `add_methods` off again; returns the names removed."""
    ours = [
        name
        for name in VERBS
        if getattr(pipeline_class.__dict__.get(name), "__module__", None) == __name__
    ]
    for name in ours:
        delattr(pipeline_class, name)
    return ours


class _Hook(MetaPathFinder):
    """Finds the pipeline module once, by the ordinary finders, and adds the verbs to it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PIPELINE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader)
        return spec


def _run_after(loader: Loader) -> None:
    execute = loader.exec_module

    @functools.wraps(execute)
    def exec_module(module: ModuleType) -> None:
        execute(module)
        add_methods(module.DiffusionPipeline)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def install() -> None:
    """Add the verbs now if diffusers' pipelines are imported, else when they are. Idempotent."""
    if os.environ.get("SNELL_DIFFUSION_NO_METHODS") == "1":
        return
    module = sys.modules.get(PIPELINE_MODULE)
    if module is not None and hasattr(module, "DiffusionPipeline"):
        add_methods(module.DiffusionPipeline)
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
