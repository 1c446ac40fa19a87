"""What a layer multiplies its inputs by outside of training, kept until something changes.

    folded    y = x (W0 + ΔW)ᵀ + b      one product, which is what the base alone costs
    beside    y = base(x) + x ΔWᵀ       where the base cannot be folded into, or would round ΔW away

Shape legend: I in features, O out features; weights and updates are (O, I), or kernels that flatten
to that. Kept is exactly what would be computed again, so keeping changes no bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from snell_diffusion.core.precision import no_autocast
from snell_diffusion.tuners.offload import hooks_of, offloaded
from snell_diffusion.tuners.weights import (
    HALVES,
    TOLERATED_LOSS,
    fingerprint,
    lowered_to,
    realised_error,
    untouched,
)

if TYPE_CHECKING:
    from snell_diffusion.tuners.layer import DeltaLayer

__all__ = ["SPARED", "Effective", "ReadyWeight", "effective_weight", "leaves_room"]

SPARED = 1 / 8
"""Share of a device's memory that kept weights leave free with `cache_in_eval = "auto"`."""

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


Tensors = Mapping[str, Tensor | None]
Source = tuple[Tensors, str, Tensor, int]
"""A tensor where it is registered, and its version."""


@dataclass(frozen=True, slots=True)
class Effective:
    """One layer's product with the updates of its active adapters in it.

    Attributes:
        weight: W0 + ΔW where `folded`, else ΔW; shaped as the base weight, in the dtype that is
            multiplied in.
        folded: Whether it takes the place of the base weight.
        kept: Whether it may be kept; if not, what follows is of no use.
        multiply: The base's operation on any weight.
        base: The module that the layer wraps; `inner` the one below other tuners' wrappers.
        hooks: Offloading hooks of `inner`; folding needs none, since there any hook counts.
        settings: `settings_of` the layer.
        device, autocast, lowered: Kind of device, whether autocast was on for it, and the 16-bit
            dtype it lowered products to.
        sources: The adapters' tensors.
        contents: Fingerprints of those that require gradients.
        origin: The base weight that was folded into, and where its data was: moving and casting it
            count no versions.
    """

    weight: Tensor
    folded: bool
    kept: bool
    multiply: Multiply
    base: nn.Module
    inner: nn.Module
    hooks: tuple[Any, Any]
    settings: tuple[Any, ...]
    device: str
    autocast: bool
    lowered: torch.dtype | None
    sources: tuple[Source, ...]
    contents: tuple[Tensor, ...]
    origin: Source | None
    address: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.folded:
            base = self.base
            # Asking a module for its bias costs as much as all of this.
            known = "bias" in base._parameters
            bias: Any = base._parameters["bias"] if known else base.bias
            return self.multiply(x, self.weight, bias)
        return self.base(x, *args, **kwargs) + self.multiply(x, self.weight, None)

    def holds(self, layer: "DeltaLayer", x: Tensor) -> bool:
        """Whether nothing it was computed from has changed; some microseconds at any size."""
        if (
            self.settings != settings_of(layer, x)
            or self.base is not layer._modules["base_layer"]
            or torch.is_autocast_enabled(self.device) is not self.autocast
            or (self.autocast and lowered_to(self.device) is not self.lowered)
            or (self.origin is None and self.hooks != hooks_of(self.inner))
            or (self.origin is not None and not self._base_holds(self.origin))
        ):
            return False
        for tensors, name, tensor, version in self.sources:
            if tensors.get(name) is not tensor or tensor._version != version:
                return False
        if torch.is_grad_enabled() and any(source[2].requires_grad for source in self.sources):
            return False
        return not self.contents or self._same_contents()

    def _base_holds(self, origin: Source) -> bool:
        tensors, name, weight, version = origin
        return (
            tensors.get(name) is weight
            and weight._version == version
            and weight.data_ptr() == self.address
            and untouched(self.base)
            # Fused optimizers count no versions.
            and not (weight.requires_grad and (torch.is_grad_enabled() or weight.grad is not None))
        )

    def _same_contents(self) -> bool:
        now = contents_of(self.sources)
        same = len(now) == len(self.contents)
        return same and torch.equal(torch.stack(self.contents), torch.stack(now))


@dataclass(frozen=True, slots=True)
class ReadyWeight:
    """W0 + ΔW (O, I) in training, made for one forward pass and differentiable, and the scales that
    are in it."""

    weight: Tensor
    scaling: dict[str, float]

    def serves(self, layer: "DeltaLayer", x: Tensor) -> bool:
        """Whether this very call would compute it: a model may set scales while it runs, and what
        is checkpointed runs again when nothing is ready."""
        return (
            x.dtype == self.weight.dtype
            and self.scaling == layer.scaling
            and torch.is_grad_enabled()
            and lowered_to(x.device.type) is None
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        )


def settings_of(layer: "DeltaLayer", x: Tensor) -> tuple[Any, ...]:
    """What decides, beside tensors, what a layer multiplies an input by and whether it is kept."""
    return x.dtype, layer._active_adapter, layer.scaling, layer.fold_16bit, layer.cache_in_eval


def contents_of(sources: tuple[Source, ...]) -> tuple[Tensor, ...]:
    """Fingerprints of what is in training: fused optimizers change it without counting versions."""
    return tuple(fingerprint(tensor) for _, _, tensor, _ in sources if tensor.requires_grad)


def effective_weight(
    layer: "DeltaLayer", x: Tensor, adapters: tuple[str, ...], fold: bool = True
) -> Effective:
    """What a layer multiplies by now.

    Args:
        x: The input, of which only dtype and device matter.
        adapters: Those that act, one or more.
        fold: Whether the base may be folded into at all.
    """
    inner, lowered = layer.get_base_layer(), lowered_to(x.device.type)
    with torch.inference_mode(False), torch.no_grad(), no_autocast(x.device):
        fn, params = layer._combined(adapters)
        delta = fn(*params)
        weight = _folded(layer, delta, params, lowered) if fold and layer.is_plain() else None
        folded = weight is not None
        if weight is None:
            weight = delta.to(lowered or x.dtype).reshape(layer.weight_shape()).contiguous()
    kept = may_keep(layer, adapters, folded) and (
        layer.cache_in_eval is True or leaves_room(weight)
    )
    sources = tuple(starmap(_source, _registered(layer, adapters))) if kept else ()
    dtype, active, scaling, *policies = settings_of(layer, x)
    return Effective(
        weight=weight,
        folded=folded,
        kept=kept,
        multiply=layer.operation(),
        base=layer.base_layer,
        inner=inner,
        hooks=hooks_of(inner),
        # Copies: the layer's own are changed in place.
        settings=(dtype, active[:], dict(scaling), *policies),
        device=x.device.type,
        autocast=torch.is_autocast_enabled(x.device.type),
        lowered=lowered,
        sources=sources,
        contents=contents_of(sources),
        origin=_source(inner._parameters, "weight") if kept and folded else None,
        address=inner.weight.data_ptr() if kept and folded else 0,
    )


def _folded(
    layer: "DeltaLayer", delta: Tensor, params: Sequence[Tensor], lowered: torch.dtype | None
) -> Tensor | None:
    """W0 + ΔW as it is multiplied, None if 16 bits would lose more of ΔW than the policy allows."""
    weight, policy = layer.get_base_layer().weight, layer.fold_16bit
    target = lowered if lowered is not None and weight.dtype != torch.float64 else weight.dtype
    if target not in HALVES:
        return layer.folded(weight, delta)
    if policy is False or isinstance(weight, FakeTensor):
        return None
    if policy == "auto" and any(tensor.requires_grad for tensor in params):
        return None  # in training an update may grow out of what is lost at first
    folded = layer.folded(weight, delta).to(target)
    if policy == "auto":
        lost = realised_error(weight.to(target), folded, delta.view_as(weight))
        return folded if lost <= TOLERATED_LOSS else None
    return folded


def _source(tensors: Tensors, name: str) -> Source:
    tensor = tensors[name]
    assert tensor is not None
    return tensors, name, tensor, tensor._version


def _registered(layer: "DeltaLayer", adapters: tuple[str, ...]) -> Iterator[tuple[Tensors, str]]:
    """The tensors of some adapters, as dictionary and key."""
    for _, container in layer.containers():
        for tensors in (container._parameters, container._buffers):
            yield from ((tensors, name) for name in adapters if tensors.get(name) is not None)


def may_keep(layer: "DeltaLayer", adapters: tuple[str, ...], folded: bool) -> bool:
    """Whether the policy allows it and every change would be noticed."""
    inner = layer.get_base_layer()
    # What is offloaded between calls must not leave its update behind on the device.
    if not layer.cache_in_eval or any(map(offloaded, (inner, *(c for _, c in layer.containers())))):
        return False
    watched = {id(tensors[name]) for tensors, name in _registered(layer, adapters)}
    used = [t for a in adapters for t in (*layer.delta_params(a), *layer.delta_state(a))]
    if any(id(tensor) not in watched for tensor in used):
        return False
    if folded:
        if inner._parameters.get("weight") is not inner.weight:
            return False
        used.append(inner.weight)
    # Tensors made in inference mode count no versions, fake ones have no content.
    return not any(tensor.is_inference() or isinstance(tensor, FakeTensor) for tensor in used)


def leaves_room(tensor: Tensor) -> bool:
    """Whether a device has memory to spare with this tensor on it, which is there already."""
    device = tensor.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "cpu":
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    else:
        return True
    return free >= SPARED * total
