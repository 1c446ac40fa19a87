"""Parameters that offloading keeps elsewhere between calls, brought back for the time of one.

Both accelerate's hooks and diffusers' group offloading bring a module's tensors to the device where
it computes when the module is called. Nothing ever calls a dictionary of parameters, so its hooks
are called here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import (  # type: ignore[import-untyped]
    AlignDevicesHook,
    SequentialHook,
)
from torch import nn

from snell_diffusion.tuners.weights import device_of

__all__ = ["compute_device", "group_hook", "hooks_of", "offloaded", "onloaded"]

GROUP_OFFLOADING = "group_offloading"  # diffusers' name of the hook


@contextmanager
def onloaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Tensors of modules on the device where their hooks compute; back again afterwards."""
    hooked = [(hook, module) for module in modules for hook in _hooks(module)]
    for hook, module in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook, module in hooked:
            hook.post_forward(module, None)


def offloaded(module: nn.Module) -> bool:
    """Whether a hook of this very module keeps its tensors elsewhere between calls."""
    return bool(_hooks(module))


def hooks_of(module: nn.Module) -> tuple[Any, Any]:
    """What accelerate and diffusers have put on this very module, None for nothing."""
    own = module.__dict__
    return own.get("_hf_hook"), own.get("_diffusers_hook")


def compute_device(layer: nn.Module) -> torch.device:
    """Where a layer computes: where its weight is, or where its hooks bring that for a call."""
    for hook in _hooks(layer):
        group = getattr(hook, "group", None)
        return torch.device(hook.execution_device if group is None else group.onload_device)
    return device_of(layer)


def group_hook(module: nn.Module) -> Any:
    """A module's own hook of diffusers' group offloading; None if it has none."""
    _, registry = hooks_of(module)
    return None if registry is None else registry.get_hook(GROUP_OFFLOADING)


def _hooks(module: nn.Module) -> list[Any]:
    hook, group = hooks_of(module)[0], group_hook(module)
    # A module that is in a model twice, as T5's embeddings are, gets its hook twice.
    each = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    found: list[Any] = [h for h in each if isinstance(h, AlignDevicesHook) and h.offload]
    return found if group is None else [*found, group]
