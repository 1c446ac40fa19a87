"""Keeps diffusers' own methods from dropping updates without a word.

diffusers fuses by copying `to_q.weight` and its sisters into one new Linear, which knows nothing of
an update that is added to them at call time. So the methods that fuse get a guard on the instances
concerned: while a delta layer below is not merged, it refuses. And `save_pretrained` of a diffusers
model writes names with `base_layer.` in them, which `from_pretrained` skips and fills with random
numbers: while a delta layer is there, a guard refuses that too. Guards look at names and methods
only and import no diffusers.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from snell_diffusion.errors import SnellaValueError, shown
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.tokens import TokenLayer
from snell_diffusion.tuners.traverse import delta_layers, every_module

__all__ = ["FusionGuard", "SaveGuard", "guard_saving", "is_fused", "protect", "release"]

GUARDED = ("fuse_qkv_projections", "fuse_projections")


class FusionGuard:
    """Stands in front of one module's method; copies with the module it belongs to."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = [place for place, layer in _layers(self.module) if not layer.merged]
        if held:
            raise SnellaValueError(
                f"{type(self.module).__name__}.{self.name}() would leave out the updates of "
                f"{len(held)} layers ({shown(held, 3)}): fuse_snella() first, which makes them "
                "part of the weights, or unload_snella_weights()"
            )
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class SaveGuard:
    """Stands in front of a diffusers model's `save_pretrained`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = _held(self.module)
        if held:
            raise SnellaValueError(
                f"{type(self.module).__name__}.save_pretrained() would write {len(held)} adapted "
                f"layers ({shown(held, 3)}) under names that from_pretrained() does not find: save "
                "the adapter by save_snella_weights(), then unload_snella_weights() and save"
            )
        return self._original()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: pipelines read off it which options they may pass."""
        return inspect.signature(self._original())

    def _original(self) -> Any:
        kind: Any = type(self.module)
        return kind.save_pretrained.__get__(self.module)


def protect(model: nn.Module) -> None:
    """Guard a model's saving and fusion, and the fusion of attentions that hold a delta layer."""
    # transformers' own save_pretrained knows adapters and writes those alone.
    if not hasattr(type(model), "get_adapter_state_dict"):
        guard_saving(model)
    for module in every_module(model):
        if module is not model and not _holds_delta(module):
            continue
        for name in GUARDED:
            if callable(getattr(type(module), name, None)) and name not in vars(module):
                setattr(module, name, FusionGuard(module, name))


def guard_saving(model: nn.Module) -> None:
    """Refuse a model's `save_pretrained`, if it has one, while a delta layer is there.

    Right for every model of a pipeline: a text encoder that is saved as its adapter alone makes the
    pipeline's folder unreadable.
    """
    if hasattr(type(model), "save_pretrained"):
        vars(model).setdefault("save_pretrained", SaveGuard(model))


def release(model: nn.Module) -> None:
    """Take the guards off a model, unless it still has a delta layer or new words."""
    if _held(model):
        return
    for module in every_module(model):
        for name in (*GUARDED, "save_pretrained"):
            if isinstance(vars(module).get(name), (FusionGuard, SaveGuard)):
                delattr(module, name)


def _held(model: nn.Module) -> list[str]:
    """What `save_pretrained` would write under other names than the base's."""
    words = [name for name, part in model.named_modules() if isinstance(part, TokenLayer)]
    return [*(path for path, _ in delta_layers(model)), *words]


def is_fused(model: nn.Module) -> bool:
    """Whether any attention of the model computes with fused projections at the moment."""
    return any(_fused(module) for module in every_module(model))


def _layers(model: nn.Module) -> Iterator[tuple[str, DeltaLayer]]:
    """Delta layers of a model, those included that a forward pre-hook holds in its `deltas`."""
    yield from delta_layers(model)
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            for place, layer in getattr(hook, "deltas", {}).items():
                yield f"{path}.{place}".lstrip("."), layer


def _fused(module: nn.Module) -> bool:
    if not getattr(module, "fused_projections", False):
        return False
    # The older attention class never takes its flag back; there the processor decides.
    if hasattr(type(module), "unfuse_projections"):
        return True
    return "Fused" in type(getattr(module, "processor", None)).__name__


def _holds_delta(module: nn.Module) -> bool:
    return any(isinstance(child, DeltaLayer) for child in module.children())
