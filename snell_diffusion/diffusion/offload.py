"""Offloading switched off while adapters come, go or are merged, and on again as it was.

Sequential offloading (accelerate's hooks) keeps weights on the meta device between calls, and group
offloading (diffusers' hooks) has lists of the tensors it moves. So the verbs that touch weights or
layers take the hooks off first and put them back on the changed model. Model offloading moves whole
models by `.to` and needs none of this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader
from torch import nn

from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners.offload import group_hook, hooks_of
from snell_diffusion.tuners.traverse import every_module

__all__ = ["offload_off"]


@contextmanager
def offload_off(*models: nn.Module) -> Iterator[None]:
    """Weights in memory for the time of a block.

    Raises:
        SnellaValueError: Group offloading keeps weights on the disk.
    """
    for model in models:
        _refuse_disk(model)
    again = [restore for model in models for restore in (_sequential(model), _group(model))]
    try:
        yield
    finally:
        for restore in again:
            restore()


def _nothing() -> None:
    return None


def _sequential(model: nn.Module) -> Callable[[], None]:
    """Take accelerate's hooks off a model that `cpu_offload` was called on."""
    hooks = (hooks_of(module)[0] for module in every_module(model))
    hook = next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)
    # Weights on the disk, or spread over devices by a map, are not ours to move.
    if hook is None or hasattr(model, "hf_device_map") or _on_disk(hook):
        return _nothing
    device, buffers = hook.execution_device, hook.offload_buffers
    remove_hook_from_module(model, recurse=True)

    def restore() -> None:
        cpu_offload(model, device, offload_buffers=buffers)

    return restore


def _on_disk(hook: AlignDevicesHook) -> bool:
    weights = getattr(hook.weights_map, "dataset", hook.weights_map)
    return isinstance(weights, OffloadedWeightsLoader) and weights.save_folder is not None


def _group(model: nn.Module) -> Callable[[], None]:
    """Take diffusers' group offloading off a model."""
    hook = next(_group_hooks(model), None)
    if hook is None:
        return _nothing
    from diffusers.hooks import HookRegistry, apply_group_offloading, group_offloading

    config = hook.config
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in (
        group_offloading._GROUP_OFFLOADING,
        group_offloading._LAYER_EXECUTION_TRACKER,
        group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING,
    ):
        registry.remove_hook(name, recurse=True)

    def restore() -> None:
        apply_group_offloading(
            model,
            onload_device=config.onload_device,
            offload_device=config.offload_device,
            offload_type=config.offload_type,
            num_blocks_per_group=config.num_blocks_per_group,
            non_blocking=config.non_blocking,
            use_stream=config.stream is not None,
            record_stream=config.record_stream,
            low_cpu_mem_usage=config.low_cpu_mem_usage,
            block_modules=config.block_modules,
            exclude_kwargs=config.exclude_kwargs,
        )

    return restore


def _group_hooks(model: nn.Module) -> Iterator[Any]:
    return (hook for module in every_module(model) if (hook := group_hook(module)) is not None)


def _refuse_disk(model: nn.Module) -> None:
    hook = next(_group_hooks(model), None)
    if hook is not None and hook.config.offload_to_disk_path is not None:
        raise SnellaValueError(
            f"{type(model).__name__} is group-offloaded to the disk "
            f"({hook.config.offload_to_disk_path}), where its weights cannot be adapted: load "
            "adapters first, then enable the offloading"
        )
