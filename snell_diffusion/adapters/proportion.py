"""Whether an adapter's updates are in proportion to the weights they are added to.

A bound from the factors alone is enough for nearly every layer, and costs next to nothing; only
where it does not prove that an update is small enough is the update evaluated.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.attach import fill, inject, is_shared, skeleton, stand_in
from snell_diffusion.adapters.state import layer_tensors
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners import METHODS, DeltaLayer, delta_layers
from snell_diffusion.tuners.weights import has_plain_weight

ROWS = 16  # every so many rows of a weight are looked at before all of them

Tensors = Mapping[str, Tensor]


def check_update(layer: Any, config: Any, tensors: Tensors, bound: float, place: str) -> None:
    """Refuse an update out of proportion.

    Args:
        layer: The base layer; it is only looked at.
        config: Settings of the adapter.
        tensors: Its tensors in this layer by short name, as a file holds them.
        bound: Largest accepted |ΔW| / |W| in Frobenius norms, at any sparsity level.
        place: File and layer, for messages.

    Raises:
        SnellaValueError: A larger one, or one that is not finite in the base's dtype.
    """
    if not _surely_within(layer, config, tensors, bound):
        measured_update(layer, config, tensors, bound, place)


@torch.no_grad()
def _surely_within(layer: Any, config: Any, tensors: Tensors, bound: float) -> bool:
    model: Any = METHODS[config.method].model
    most = model.tuner_layer_cls.norm_bound(config, tensors)
    known, size = has_plain_weight(layer), math.prod(_shape(layer))
    if not most <= torch.finfo(layer.weight.dtype if known else torch.float32).max:
        return False
    floor = (limits.MIN_BASE_RMS if known else limits.UNKNOWN_BASE_RMS) * math.sqrt(size)
    if most <= bound * floor:
        return True
    return known and any(most <= bound * _norm(layer.weight[::step]) for step in (ROWS, 1))


def _shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape)
    return layer.out_features, layer.in_features


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))


def measured_update(
    layer: Any, config: Any, tensors: Tensors, bound: float = math.inf, place: str = ""
) -> float:
    """|ΔW| / |W| with no entry dropped, from one evaluation of the update; 0 where W is quantized.

    Args and raises as `check_update`.
    """
    config = copy.copy(config)
    config.target_modules = ["layer"]
    shadow = skeleton({"layer": stand_in(layer, has_plain_weight(layer))})
    inject(shadow, config, ["layer"], "measured")
    ((_, twin),) = delta_layers(shadow)
    fill(twin, "measured", tensors)
    # At threshold 0 no entry is smaller than at any other. A stored threshold, or a level of 1,
    # could hide entries that `set_snella_sparsity` brings back; level 0 would still hide the
    # smallest, which are all of them where they are equal.
    for name, tensor in layer_tensors(twin, "measured").items():
        if name.endswith("_threshold"):
            tensor.zero_()
    return _relative_update(twin, bound, place)


def relative_change(layer: DeltaLayer, adapter: str) -> float:
    """|ΔW| / |W| of a live layer; 0 where W is quantized."""
    base = layer.get_base_layer()
    if not has_plain_weight(base) and layer.kind != "norm":
        return 0.0
    floor = limits.MIN_BASE_RMS * base.weight.numel() ** 0.5
    return layer.update_size(adapter) / max(_norm(base.weight), floor)


def check_filled(layer: DeltaLayer, bound: float, place: str) -> None:
    """Refuse an adapter out of proportion in a stand-in of a layer, filled with its tensors.

    Raises:
        SnellaValueError: Its effect is larger than `bound` times the weight, or not finite.
    """
    (adapter,) = layer.configs
    weight = layer.get_base_layer().weight
    known = is_shared(weight) and weight.dim() > 0
    rms = limits.MIN_BASE_RMS if known else limits.UNKNOWN_BASE_RMS
    floor = rms * math.prod(weight.shape) ** 0.5
    ratio = layer.update_size(adapter) / max(_norm(weight) if known else 0.0, floor)
    _require_within(ratio, bound, place)


def _require_within(ratio: float, bound: float, place: str) -> None:
    if not ratio <= bound:
        raise SnellaValueError(
            f"{place}: expected an update at most {bound:g} times as large as the weight it is "
            f"added to, got {ratio:.3g} times; the file is damaged: use another checkpoint, or "
            "raise max_relative_update"
        )


@torch.no_grad()
def _relative_update(layer: Any, bound: float, place: str) -> float:
    delta = layer.get_delta_weight("measured")
    weight = layer.get_base_layer().weight
    known = is_shared(weight)
    largest = torch.finfo(weight.dtype if known else torch.float32).max
    if not float(delta.abs().max()) <= largest:
        raise SnellaValueError(
            f"{place}: expected an update of finite {weight.dtype} numbers, got NaN, infinite or "
            "larger ones although its tensors are finite; use another checkpoint of this adapter"
        )
    size = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    rms = limits.MIN_BASE_RMS if known else limits.UNKNOWN_BASE_RMS
    floor = rms * delta.numel() ** 0.5
    norm = _norm(weight) if known else 0.0
    ratio = size / max(norm, floor)
    _require_within(ratio, bound, place)
    return ratio if known else 0.0
