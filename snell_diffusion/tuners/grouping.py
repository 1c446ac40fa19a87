"""Small layers in training: their updates are computed together when a forward pass begins.

A hook on the model makes W0 + s ΔW of all small SNELLA layers, stack by stack of one shape, and
each layer multiplies by what is ready. It is cleared when the pass ends, so nothing outlives a
change of parameters. Layers it cannot serve (16-bit or quantized bases, dropout, several adapters,
activation checkpointing, compiled code) compute their own update, as they do without it. The memory
is that of the weights served, twice while their gradients are gathered, at most 8 bytes x
`TOTAL_ENTRIES`. On a GPU with the fused kernels the thresholds of all other layers of a shape are
found together, too, whatever their base: a hundred layers do not pay a hundred times the launches.
"""

from typing import Any

import torch
from torch import nn

from snell_diffusion.core import LIVE_AT_ZERO, Member, grouped_thresholds, grouped_weights
from snell_diffusion.tuners.effective import ReadyWeight
from snell_diffusion.tuners.snella import SnellaLayer

__all__ = ["group_small_layers"]

LAYER_ENTRIES = 2**15  # above it arithmetic outweighs the calls
STACK_ENTRIES = 2**18  # of one stack: its working memory stays near the cache
TOTAL_ENTRIES = 2**22


def group_small_layers(model: nn.Module) -> "Grouping":
    """Compute the updates of a model's small SNELLA layers together from now on.

    Args:
        model: What is called in training; layers may be added or deleted later.

    Returns:
        Handle whose `remove` ends it.
    """
    return Grouping(model)


class Grouping:
    def __init__(self, model: nn.Module) -> None:
        self._served: list[SnellaLayer] = []
        self._hooks = (
            model.register_forward_pre_hook(self._prepare),
            model.register_forward_hook(self._clear, always_call=True),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _prepare(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        layers, again = linear_layers(model)
        small: dict[Any, list[tuple[SnellaLayer, Member]]] = {}
        large: dict[Any, list[tuple[SnellaLayer, Member]]] = {}
        room = 0 if again else TOTAL_ENTRIES
        for layer in layers:
            size = layer.in_features * layer.out_features
            fits = size <= min(LAYER_ENTRIES, room) and layer.trains_folded()
            member = _member(layer) if fits or on_gpu(layer) else None
            if member is None:
                continue
            fits = fits and member.weight.dtype == torch.float32
            room -= size if fits else 0
            (small if fits else large).setdefault(member.alike(), []).append((layer, member))
        for stack in small.values():
            size = max(1, STACK_ENTRIES // stack[0][1].weight.numel())
            for start in range(0, len(stack), size):
                self._serve(stack[start : start + size])
        for stack in large.values():
            self._measure(stack)

    def _measure(self, stack: list[tuple[SnellaLayer, Member]]) -> None:
        """Find the thresholds of layers too large to be held, on a GPU."""
        if stack[0][1].update.rule in LIVE_AT_ZERO:
            return  # these want more than a threshold
        limits = grouped_thresholds([member for _, member in stack])
        for (layer, _), limit in zip(stack, limits or (), strict=limits is not None):
            layer.limits[layer.acting()[0]] = limit
            self._served.append(layer)

    def _serve(self, stack: list[tuple[SnellaLayer, Member]]) -> None:
        weights = grouped_weights([member for _, member in stack])
        for (layer, _), weight in zip(stack, weights, strict=True):
            layer.ready = ReadyWeight(weight, dict(layer.scaling))
            self._served.append(layer)

    def _clear(self, model: nn.Module, args: Any, result: Any) -> None:
        for layer in self._served:
            layer.ready = None
            layer.limits.clear()
        self._served.clear()


def linear_layers(model: nn.Module) -> tuple[list[SnellaLayer], bool]:
    """Those of a model, and whether its parts run again in the backward pass (activation
    checkpointing), when nothing is ready."""
    layers, again = [], False
    for part in model.modules():
        again = again or bool(vars(part).get("gradient_checkpointing"))
        if isinstance(part, SnellaLayer) and part.kind == "linear":
            layers.append(part)
    return layers, again


def on_gpu(layer: SnellaLayer) -> bool:
    return any(p.is_cuda for p in layer.snella_A.values())


def _member(layer: SnellaLayer) -> Member | None:
    """The layer's update if it can be computed with others."""
    adapters = layer.acting()
    if len(adapters) != 1 or not layer.training or layer.idle(adapters):
        return None
    (adapter,) = adapters
    params, weight = layer.delta_params(adapter), layer.get_base_layer().weight
    if any(p.dtype != torch.float32 for p in params) or not any(p.requires_grad for p in params):
        return None
    if not isinstance(weight, torch.Tensor) or weight.requires_grad:
        return None
    layer.on_training_forward(adapter)
    update = layer.kernel_update(adapter)
    if not update.by_products(params[0]):
        return None
    return Member(update, params, weight, layer.scaling[adapter])
