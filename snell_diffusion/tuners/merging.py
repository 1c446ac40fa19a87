"""Updates written into a base weight, and the weight restored bit for bit.

Weights and updates are (O, I) = (out features, in features), or kernels that flatten to that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snell_diffusion.tuners.weights import fingerprint, has_plain_weight, realised_error

if TYPE_CHECKING:
    from snell_diffusion.tuners.layer import DeltaLayer

__all__ = ["Merged", "merge", "unmerge"]


@dataclass(frozen=True)
class Merged:
    """What `unmerge` needs: the weight before, a fingerprint of it after, the scales merged."""

    original: Tensor
    written: Tensor
    scales: dict[str, float]

    def then(self, later: "Merged") -> "Merged":
        """This and a merge that followed it."""
        return replace(self, written=later.written, scales={**self.scales, **later.scales})


def merge(layer: "DeltaLayer", adapters: Sequence[str], safe: bool) -> tuple[Merged, float]:
    """Write W0 + Σ s_a ΔW_a into a layer's base weight, summed in float32.

    Args:
        adapters: Those to merge, one or more.
        safe: Refuse, before anything is written, a result that is not finite.

    Returns:
        What to undo it by, and the share of the update that rounding lost.

    Raises:
        ValueError: The result is not finite (`safe`), or the base weight is quantized.
    """
    weight = _writable_weight(layer, adapters)
    with torch.no_grad(), layer._onloaded():
        fn, params = layer._combined(adapters)
        delta = fn(*params)
        merged = layer.folded(weight, delta)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(
                f"merging adapter(s) {', '.join(adapters)} would write NaN or infinite values "
                "into the base weight, nothing was changed; the adapter's own values are "
                "broken: load an earlier one"
            )
        error = realised_error(weight, merged, delta.view_as(weight))
        original = weight.detach().to("cpu", copy=True)
        weight.copy_(merged)
    scales = {name: layer.scaling[name] for name in adapters}
    return Merged(original, fingerprint(weight), scales), error


@torch.no_grad()
def unmerge(layer: "DeltaLayer", merged: Merged) -> None:
    """Restore a layer's base weight.

    Only if someone else has changed it since `merge` (another tuner merged into it too) is the
    update subtracted instead, which is exact to rounding.
    """
    weight = layer.get_base_layer().weight
    cast = weight.dtype != merged.original.dtype
    if cast or torch.equal(fingerprint(weight), merged.written):
        weight.copy_(merged.original)
    else:
        fn, params = layer._combined(layer.merged_adapters, merged.scales)
        weight.copy_(layer.folded(weight, -fn(*params)))


def _writable_weight(layer: "DeltaLayer", adapters: Sequence[str]) -> Tensor:
    base = layer.get_base_layer()
    if not has_plain_weight(base):
        weight = getattr(base, "weight", None)
        raise ValueError(
            f"cannot merge adapter(s) {', '.join(adapters)} into {type(base).__name__} with "
            + (
                f"weights of type {type(weight).__name__} and dtype {weight.dtype}"
                if isinstance(weight, Tensor)
                else "no weight of floats"
            )
            + ": use the adapter unmerged, or load the base model unquantized and uncompressed"
        )
    return base.weight
