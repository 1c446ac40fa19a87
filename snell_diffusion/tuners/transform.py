"""Layers of methods that are not a matrix added to a weight.

Some change a layer's input (ARC), its single weights and its bias (SPT), or add to its output what
no matrix can (adapters with an activation). They wrap, switch, scale and load like every other
method; what they do in a call, and what merging writes, is their own.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from snell_diffusion.core import DeltaFn
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.weights import fingerprint, has_plain_weight, realised_error

__all__ = ["TransformLayer"]


@dataclass(frozen=True)
class Written:
    """What `unmerge` needs: every parameter before, None where there was none, and its mark now."""

    originals: dict[str, Tensor | None]
    marks: dict[str, Tensor]


class TransformLayer(DeltaLayer):
    """A module whose call a method changes; see `transformed` and `merged_parameters`.

    Attributes:
        mergeable: Whether parameters of the base can hold what the method does.
    """

    mergeable = True
    _written: Written | None = None

    @abstractmethod
    def transformed(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The whole call with some adapters, each at its `scaling`.

        Args:
            x: The module's input, [..., I].
            adapters: Active ones whose scale is not zero, one or more.
        """

    def merged_parameters(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        """What the base's parameters become, by name ("weight", "bias"), in float32 or float64.

        A bias may be given where the base has none.

        Raises:
            ValueError: The method cannot be merged; says why.
        """
        raise ValueError(self.why_not_mergeable())

    def why_not_mergeable(self) -> str:
        return (
            f"{type(self).__name__} cannot be merged: what it adds is no matrix product of its "
            "input; use the adapter unmerged"
        )

    def writable(self) -> bool:
        """Whether the base's parameters are floats as they stand, which merging can write."""
        return has_plain_weight(self.get_base_layer())

    def delta_params(self, adapter: str) -> tuple[Tensor, ...]:
        names: tuple[str, ...] = tuple(type(self).adapter_layer_names)
        return tuple(
            container[adapter]
            for name, container in self.containers()
            if name in names and adapter in container
        )

    def delta_fn(self, adapter: str) -> DeltaFn:
        raise ValueError(f"{type(self).__name__} adds no matrix to the weight")

    def update_size(self, adapter: str) -> float:
        """Frobenius norm of what merging would add to the weight, scale included.

        Of methods that cannot be merged, a bound on their effect in place of it: the product of
        their matrices' norms, and the norms of their vectors.
        """
        with torch.no_grad(), self._onloaded():
            if not self.mergeable:
                norms = [(p.dim(), float(p.norm())) for p in self.delta_params(adapter)]
                matrices = [norm for dim, norm in norms if dim > 1]
                vectors = sum(norm for dim, norm in norms if dim <= 1)
                product = math.prod(matrices) if matrices else 0.0
                return abs(self.scaling[adapter]) * (product + vectors)
            weight = self.get_base_layer().weight.detach()
            merged = self.merged_parameters((adapter,)).get("weight")
            if merged is None:
                return 0.0
            return float(torch.linalg.vector_norm(merged - weight.to(merged.dtype)))

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.acting()
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        with self._onloaded():
            if self.training and torch.is_grad_enabled():
                for name in adapters:
                    self.on_training_forward(name)
            return self.transformed(x, adapters, *args, **kwargs)

    # Merge

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write what the adapters do into the base's parameters, keeping a copy of those.

        Args:
            safe_merge: Refuse, before anything is written, if a value is not finite.
            adapter_names: Which adapters; None takes the active ones. Those not here are left out.

        Raises:
            ValueError: The method cannot be merged, an adapter is merged already, a value is not
                finite (`safe_merge`), or the base is quantized.
        """
        asked = check_adapters_to_merge(self, adapter_names)
        adapters = [name for name in asked if name in self.configs]
        if not adapters:
            return
        if self._written is not None:
            raise ValueError(
                f"{type(self).__name__} has {', '.join(self.merged_adapters)} merged: unmerge "
                "first and merge all adapters in one call"
            )
        if not self.mergeable:
            raise ValueError(self.why_not_mergeable())
        base: nn.Module = self.get_base_layer()
        if not self.writable():
            raise ValueError(
                f"cannot merge adapter(s) {', '.join(adapters)} into {type(base).__name__}, whose "
                "weight is no plain tensor of floats: use the adapter unmerged, or load the base "
                "model unquantized"
            )
        with self._onloaded():
            values = self.merged_parameters(adapters)
        if safe_merge and not all(bool(value.isfinite().all()) for value in values.values()):
            raise ValueError(
                f"merging adapter(s) {', '.join(adapters)} would write NaN or infinite values, "
                "nothing was changed; load an earlier adapter"
            )
        originals: dict[str, Tensor | None] = {}
        marks: dict[str, Tensor] = {}
        error = 0.0
        for name, value in values.items():
            error = max(error, self._write(base, name, value, originals))
            marks[name] = fingerprint(getattr(base, name))
        self._written = Written(originals, marks)
        self.merge_error.update(dict.fromkeys(adapters, error))
        self.merged_adapters.extend(adapters)

    @staticmethod
    def _write(
        base: nn.Module, name: str, value: Tensor, originals: dict[str, Tensor | None]
    ) -> float:
        """Set one parameter; returns the share of its change that rounding lost."""
        before = getattr(base, name)
        if before is None:
            value = value.to(next(base.parameters()))
            setattr(base, name, nn.Parameter(value, requires_grad=False))
            originals[name] = None
            return 0.0
        originals[name] = before.detach().to("cpu", copy=True)
        rounded = value.to(before.dtype)
        lost = realised_error(before, rounded, value - before.to(value.dtype))
        before.copy_(rounded)
        return lost

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base's parameters bit for bit.

        Raises:
            ValueError: Somebody else wrote to them since; merge and unmerge in order.
        """
        written = self._written
        if written is None:
            super().unmerge()  # warns
            return
        base = self.get_base_layer()
        for name, mark in written.marks.items():
            if not torch.equal(fingerprint(getattr(base, name)), mark.to(base.weight.device)):
                raise ValueError(
                    f"the {name} of this {type(base).__name__} was written to after "
                    f"{', '.join(self.merged_adapters)} had been merged: undo that first"
                )
        for name, original in written.originals.items():
            if original is None:
                setattr(base, name, None)
            else:
                getattr(base, name).copy_(original)
        self._written = None
        self.merged_adapters.clear()
        self.merge_error.clear()
        self.unscale_layer()
