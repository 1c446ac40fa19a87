"""An adapter for good: its update becomes part of the weights, and stock modules stay behind."""

import torch

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.attach import remove_adapter
from snell_diffusion.adapters.export import NAME, LayerError
from snell_diffusion.adapters.load import load_adapter
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.state import Components, adapter_layers
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners import DeltaLayer
from snell_diffusion.tuners.transform import TransformLayer

__all__ = ["merge_adapter"]


@torch.no_grad()
def merge_adapter(
    components: Components,
    file: AdapterFile,
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
    max_relative_update: float = limits.MAX_RELATIVE_UPDATE,
) -> tuple[LayerError, ...]:
    """Add an adapter's update to the weights of live models; no trace of the adapter is left.

    Args:
        components: Models by the names the file uses. Load them in float32: weights are rounded to
            `dtype` once, after the sum.
        dtype: What the weights will be stored in. The models' own dtype stays; values are rounded.

    Returns:
        Per layer, what rounding took from the update: |W' − W − ΔW| against |ΔW|.

    Raises:
        SnellaError: As `load_adapter`.
        SnellaValueError: A weight would not be finite in `dtype`. The models are as they were then.
    """
    load_adapter(components, file, NAME, allow_other_base, max_relative_update)
    layers = list(adapter_layers(components, NAME))
    try:
        rows = tuple(
            _measure(f"{component}.{path}", layer, dtype, file.source)
            for component, path, layer in layers
        )
        for _, _, layer in layers:
            base = layer.get_base_layer()
            for name, value in _merged(layer, dtype).items():
                if getattr(base, name) is None:
                    setattr(base, name, torch.nn.Parameter(value, requires_grad=False))
                else:
                    getattr(base, name).copy_(value)
    finally:
        for model in components.values():
            remove_adapter(model, NAME)
    return rows


def _merged(layer: DeltaLayer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The new values of the base's parameters, rounded once."""
    if isinstance(layer, TransformLayer):
        if not layer.mergeable:
            raise SnellaValueError(layer.why_not_mergeable())
        values = layer.merged_parameters((NAME,))
        return {name: value.to(dtype) for name, value in values.items()}
    weight: torch.Tensor = layer.get_base_layer().weight
    return {"weight": layer.folded(weight, layer.get_delta_weight(NAME)).to(dtype)}


def _measure(name: str, layer: DeltaLayer, dtype: torch.dtype, source: str) -> LayerError:
    weight, merged = layer.get_base_layer().weight, _merged(layer, dtype)
    if not all(bool(torch.isfinite(value).all()) for value in merged.values()):
        raise SnellaValueError(
            f"{source}: {name}: weight plus update exceeds the range of {dtype}; "
            "merge into bfloat16 or float32"
        )
    rounded = merged.get("weight", weight)
    if isinstance(layer, TransformLayer):
        exact = layer.merged_parameters((NAME,)).get("weight", weight)
        delta = exact - weight.to(exact.dtype)
    else:
        delta = layer.get_delta_weight(NAME)
    change = (rounded.double() - weight.double()).view(len(weight), -1)
    return LayerError.of(name, delta.view(len(weight), -1), change)
