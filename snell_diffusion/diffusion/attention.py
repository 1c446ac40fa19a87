"""Attention processors that insert the updates, for models whose modules must stay as they are.

The updates' home are the tuner layers of `snell_diffusion.tuners`. `SnellaAttnProcessor.install`
takes those that sit on the projections of attention blocks out of the module tree and hands them
to the blocks' processors, so that `to_q`, `to_k`, `to_v`, `to_out`, `add_*_proj` and `to_add_out`
are stock modules again; `remove` puts them back. The arithmetic is the tuner layers' own either
way, so pictures are equal bit for bit.

A processor here is an instance of a generated subclass of the processor class that was there: its
`__call__` has the same signature (diffusers drops keyword arguments that a signature does not
name), its attributes are the same, and all it changes is what the base class sees as the
projections.

What is not reached by a processor stays a tuner layer: feed-forward blocks, FLUX's single-block
`proj_mlp` and `proj_out`, Lumina-Next's `to_out`. While installed, the layers are outside the
module tree: PEFT's and diffusers' own verbs (`set_adapters`, the call-time `scale`, an optimizer)
do not see them; the SNELLA verbs of `snell_diffusion.diffusion.pipeline` do.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from snell_diffusion.diffusion.offload import offload_off
from snell_diffusion.diffusion.reach import reaches
from snell_diffusion.errors import SnellaKeyError, SnellaValueError, shown
from snell_diffusion.tuners import DeltaLayer
from snell_diffusion.tuners.offload import compute_device
from snell_diffusion.tuners.qkv_guard import is_fused
from snell_diffusion.tuners.traverse import every_module, unwrapped
from snell_diffusion.versions import require

require("diffusers", "transformers")

__all__ = ["SnellaAttnProcessor", "processors_off"]


class _Keeper:
    """What one attention block has given away: its delta layers by the place they came from.

    Registered as the block's forward pre-hook, it sees to it that whatever processor is on the
    block when it runs, set by `set_attn_processor`, attention slicing, IP-Adapter or by hand,
    inserts the updates.
    """

    def __init__(self, attn: nn.Module, deltas: dict[str, DeltaLayer]) -> None:
        self.attn = attn
        self.deltas = deltas
        self.handle: RemovableHandle | None = None

    def __call__(self, attn: nn.Module, args: Any) -> None:
        if getattr(attn.processor, "snella_keeper", None) is self:
            return
        processor = _unwrap(attn.processor)
        lost = [place for place in self.deltas if not reaches(processor, attn, place)]
        if lost:
            raise SnellaValueError(
                f"{type(processor).__name__} does not use {shown(lost)} of "
                f"{type(attn).__name__}, so their updates would be left out: call "
                "SnellaAttnProcessor.remove(model) before setting this processor"
            )
        _set_processor(attn, _wrap(processor, self))

    def overrides(self) -> dict[str, Any]:
        """Attributes the base processor gets in place of the block's own: `to_q`, `to_out`, ..."""
        views: dict[str, Any] = {}
        for place, delta in self.deltas.items():
            self._follow(place, delta)
            name, dot, index = place.partition(".")
            if not dot:
                views[name] = delta
                continue
            if name not in views:
                views[name] = list(getattr(self.attn, name))
            views[name][int(index)] = delta
        return views

    def _follow(self, place: str, delta: DeltaLayer) -> None:
        """Wrap what is on the block now: another adapter may have been put there or taken off."""
        current = self.attn.get_submodule(place)
        if delta.base_layer is not current:
            vars(delta.base_layer).pop("_apply", None)
            delta.base_layer = current
            vars(current)["_apply"] = functools.partial(_moved, current, delta)
        device = compute_device(delta.get_base_layer())
        # Outside the module tree, neither pipe.to(device) nor offloading reaches the factors.
        for _, container in delta.containers():
            if any(tensor.device != device for tensor in container.values()):
                container.to(device)
                delta.clear_cache()

    def watch(self) -> None:
        """Let what a layer keeps go where its base moves: it is not in the tree to be told."""
        for delta in self.deltas.values():
            base = delta.base_layer
            vars(base)["_apply"] = functools.partial(_moved, base, delta)

    def give_back(self) -> None:
        for place, delta in self.deltas.items():
            vars(delta.base_layer).pop("_apply", None)
            delta.base_layer = self.attn.get_submodule(place)
            _put(self.attn, place, delta)


def _moved(base: nn.Module, delta: DeltaLayer, *args: Any, **kwargs: Any) -> nn.Module:
    """`base._apply`, which moves and casts, for a base whose layer keeps a weight of its own."""
    delta.clear_cache()
    return type(base)._apply(base, *args, **kwargs)


class _View:
    """An attention block as a processor sees it, with other projections."""

    def __init__(self, attn: nn.Module, overrides: dict[str, Any]) -> None:
        self.__dict__.update(overrides)
        self.__dict__["_attn"] = attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_attn"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_attn"], name, value)


class SnellaAttnProcessor:
    """Base of all generated processors, and the place to install and remove them.

        pipe.load_snella_weights("my-adapter")
        SnellaAttnProcessor.install(pipe.unet)      # modules are stock again, pictures unchanged
        SnellaAttnProcessor.remove(pipe.unet)       # back to tuner layers

    Attributes:
        snella_keeper: The delta layers of the block this instance is for.
    """

    snella_keeper: _Keeper | None = None

    @staticmethod
    def install(model: nn.Module) -> int:
        """Move the updates of a model's attention projections into attention processors.

        Args:
            model: A denoiser with SNELLA adapters loaded, e.g. `pipe.unet`; its QKV projections not
                fused.

        Returns:
            How many attention blocks got a processor.

        Raises:
            SnellaKeyError: No attention projection that a processor reaches has an adapter.
            SnellaValueError: QKV projections are fused.
        """
        if is_fused(model):
            raise SnellaValueError(
                f"{type(model).__name__} computes with fused QKV projections, which a processor "
                "cannot reach: call unfuse_qkv_projections() first"
            )
        found = [(attn, deltas) for attn in _blocks(model) if (deltas := _reached_deltas(attn))]
        if not found:
            raise SnellaKeyError(
                f"no attention projection of {type(model).__name__} has a SNELLA adapter"
                + (" that is not installed yet" if _keepers(model) else "")
                + ": load one first (load_snella_weights or add_adapter)"
            )
        with offload_off(model):
            for attn, deltas in found:
                for place, delta in deltas.items():
                    _put(attn, place, delta.base_layer)
                keeper = _Keeper(attn, deltas)
                keeper.watch()
                keeper.handle = attn.register_forward_pre_hook(keeper)
                keeper(attn, ())
        return len(found)

    @staticmethod
    def remove(model: nn.Module) -> int:
        """Put the updates back into the module tree and the processors that were there back on.

        Returns:
            How many attention blocks had a processor of ours; 0 if none was installed.
        """
        keepers = _keepers(model)
        if not keepers:
            return 0
        with offload_off(model):
            for attn, keeper in keepers:
                assert keeper.handle is not None
                keeper.handle.remove()
                _set_processor(attn, _unwrap(attn.processor))
                keeper.give_back()
        return len(keepers)


@contextmanager
def processors_off(*models: nn.Module) -> Iterator[None]:
    """Tuner layers in place for the time of a block; processors come back where layers remain."""
    installed = [model for model in models if SnellaAttnProcessor.remove(model)]
    try:
        yield
    finally:
        for model in installed:
            if any(_reached_deltas(attn) for attn in _blocks(model)):
                SnellaAttnProcessor.install(model)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in every_module(unwrapped(model))
        if callable(getattr(module, "processor", None))
    ]


def _keepers(model: nn.Module) -> list[tuple[nn.Module, _Keeper]]:
    return [
        (attn, hook)
        for attn in _blocks(model)
        for hook in attn._forward_pre_hooks.values()
        if isinstance(hook, _Keeper)
    ]


def _own_deltas(attn: nn.Module) -> dict[str, DeltaLayer]:
    """Delta layers that are the block's projections, by place: `to_q`, `to_out.0`."""
    places: dict[str, DeltaLayer] = {}
    for name, child in attn.named_children():
        if isinstance(child, DeltaLayer):
            places[name] = child
        elif isinstance(child, (nn.ModuleList, nn.Sequential)):
            places |= {
                f"{name}.{index}": item
                for index, item in child.named_children()
                if isinstance(item, DeltaLayer)
            }
    return places


def _reached_deltas(attn: nn.Module) -> dict[str, DeltaLayer]:
    """Those of them that the block's processor calls."""
    processor = _unwrap(attn.processor)
    return {
        place: delta
        for place, delta in _own_deltas(attn).items()
        if reaches(processor, attn, place)
    }


def _set_processor(attn: nn.Module, processor: Any) -> None:
    # Mochi's attention has a processor and no method to set it.
    if callable(getattr(attn, "set_processor", None)):
        attn.set_processor(processor)  # type: ignore[operator]
    else:
        attn.processor = processor


def _put(attn: nn.Module, place: str, module: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(attn.get_submodule(parent) if parent else attn, name, module)


def _wrap(processor: Any, keeper: _Keeper) -> Any:
    """A copy of a processor whose class inserts the keeper's updates."""
    twin = copy.copy(processor)
    twin.__class__ = _generated(type(processor))
    # Past nn.Module's own __setattr__: the delta layers must not become the processor's children.
    vars(twin)["snella_keeper"] = keeper
    vars(twin)["snella_original"] = processor
    return twin


def _unwrap(processor: Any) -> Any:
    """The processor below one of ours, with what was set on ours since; others as they are."""
    if not isinstance(processor, SnellaAttnProcessor):
        return processor
    state = {k: v for k, v in vars(processor).items() if not k.startswith("snella_")}
    original = vars(processor).get("snella_original")
    if original is None:
        # Made by `processor.__class__()`, as IP-Adapter does to reset a block.
        original = copy.copy(processor)
        original.__class__ = type(processor).__bases__[1]
    vars(original).update(state)
    return original


@functools.cache
def _generated(base: type) -> type:
    """The subclass of a processor class that hands it the updates; one per base class."""

    @functools.wraps(base.__call__)
    def __call__(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keeper = self.snella_keeper
        if keeper is None or keeper.attn is not attn:
            return base.__call__(self, attn, *args, **kwargs)
        return base.__call__(self, _View(attn, keeper.overrides()), *args, **kwargs)

    generated = type(
        f"Snella{base.__name__}",
        (SnellaAttnProcessor, base),
        {"__call__": __call__, "__doc__": base.__doc__, "__module__": __name__},
    )
    _register(base, generated)
    return generated


def _register(base: type, generated: type) -> None:
    """Let diffusers' layer skipping treat the generated class as its base."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(base)
    except ValueError:
        return  # the base itself cannot be skipped
    AttentionProcessorRegistry.register(generated, metadata)
