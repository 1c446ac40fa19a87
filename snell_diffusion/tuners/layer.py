"""The layer every method shares: a module with additive updates, y = x (W0 + Σ s_a ΔW_a)ᵀ + b.

Shape legend: I in features, O out features; weights and updates are (O, I), inputs [..., I]. What
is here is a Linear's; `conv.py` has the same for kernels flattened to rows.

A method gives parameters and one pure function of them (`delta_params`, `delta_fn`). Wrapping,
forward, merge, unmerge, dropout and disabling follow from those two here; which adapters there are,
and how strong, is in `holder.py`.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from snell_diffusion.core import BlockUpdate, DeltaFn, ScaledSum, WholeUpdate, fold, merged_linear
from snell_diffusion.tuners.effective import (
    Effective,
    Multiply,
    ReadyWeight,
    effective_weight,
    may_keep,
)
from snell_diffusion.tuners.holder import AdapterHolder
from snell_diffusion.tuners.merging import Merged, merge, unmerge
from snell_diffusion.tuners.offload import onloaded
from snell_diffusion.tuners.weights import (
    HALVES,
    is_linear_like,
    is_plain,
    lowered_to,
    untouched,
)

if TYPE_CHECKING:
    from snell_diffusion.tuners.base import DeltaConfig

__all__ = ["DeltaLayer"]


class DeltaLayer(AdapterHolder):
    """A Linear (or, in `conv.py`, a Conv2d) that adds the updates of its active adapters.

    A float32 or float64 base takes part in one product with W0 + ΔW. A quantized base, a base with
    hooks and a base that another tuner has wrapped are called as they are, and the update is a
    second product. So it is in training with a 16-bit base or autocast to 16 bits: rounding
    W0 + ΔW would drop every entry of ΔW below half a unit of W0's last place, which early in
    training is nearly all of them.

    In eval mode without gradients what inputs are multiplied by is computed once and kept: W0 + ΔW
    in the base's dtype, so that a call costs what a call of the base costs. Frozen updates are
    folded into a 16-bit base where rounding loses at most `TOLERATED_LOSS` of ΔW, measured by layer
    (`fold_16bit` "auto"; True always folds, in training too, False never). It is computed again
    when a parameter, level, strength, the active set, dtype, device or the base weight changes, and
    dropped by `train`, `eval`, merging and moving. Adapter parameters that require gradients are
    compared by content, since fused optimizers count no versions; writing through `.data` of others
    goes unnoticed: call `clear_cache()` after it.

    `cache_in_eval` "auto" keeps it while the device has memory to spare (`effective.SPARED`), True
    always, False never: then it is computed at every call, with the same result. It is one copy of
    each adapted weight (`clear_cache` releases it); `merge` needs none on the device.

    Attributes:
        r, scaling, configs: By adapter, as of `AdapterHolder`.
        trained_sparsity: By adapter, the level and threshold it was trained with, kept while
            another level is tried out at inference time.
        merge_error: By merged adapter, how far the weight written is from the exact sum, relative
            to the update: |W - W0 - ΔW| / |ΔW| in Frobenius norms; 0 is exact, 1 is all lost.

    Raises:
        TypeError: The layer to wrap is neither like an `nn.Linear` (`weights.is_linear_like`) nor,
            for `conv.py`, an `nn.Conv2d`.
    """

    other_param_names: tuple[str, ...] = (
        *AdapterHolder.other_param_names,
        *("merge_error", "trained_sparsity"),
    )
    kind = "linear"
    packed_names: tuple[str, ...] = ()
    """Containers of factors that files may hold in few bits per number (a config's `bits`)."""
    alike = True
    """Whether layers of one form have tensors of the same shapes, whatever the others are."""
    stock: type[nn.Module] = nn.Linear
    fold_16bit: bool | Literal["auto"] = "auto"
    cache_in_eval: bool | Literal["auto"] = "auto"

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: "DeltaConfig", key: str
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.adopt(key)
        self.merge_error: dict[str, float] = {}
        self.trained_sparsity: dict[str, dict[str, Tensor]] = {}
        self._merged: Merged | None = None
        self._kept: Effective | None = None
        self.ready: ReadyWeight | None = None
        self.add_containers()
        self.update_layer(adapter_name, config, key)

    # What a kind of module provides

    def adopt(self, key: str) -> None:
        """Read `in_features` and `out_features`, the sizes of an update, off the base layer."""
        linear = self.get_base_layer()
        if not is_linear_like(linear):
            raise TypeError(
                f"{type(self).__name__} wraps nn.Linear or nn.Conv2d, but target module {key!r} is "
                f"{type(linear).__name__}: leave it out of target_modules"
            )
        self.in_features = linear.in_features
        self.out_features = linear.out_features

    def weight_shape(self) -> tuple[int, ...]:
        """The base weight's shape; flattened after its first axis it is (O, I)."""
        return self.out_features, self.in_features

    def is_plain(self) -> bool:
        """Whether calling the base layer is exactly `multiply` by its weight and bias."""
        return is_plain(self.base_layer, self.stock)

    def operation(self) -> Multiply:
        """What the base layer computes, of an input, any weight and a bias."""
        return F.linear

    def multiply_trained(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        update: BlockUpdate,
        params: Sequence[Tensor],
        folds: bool,
    ) -> Tensor:
        """The same with weight + update(*params), for a backward pass that keeps no update.

        Without a weight it is the update's product alone; `folds` as `core.merged_linear`.
        """
        return merged_linear(x, weight, bias, update, params, folds=folds)

    @staticmethod
    def folded(weight: Tensor, delta: Tensor) -> Tensor:
        """Weight plus update (O, I), shaped as the weight, rounded once to its dtype."""
        return fold(weight.flatten(1), delta).view_as(weight)

    # What a method provides

    @abstractmethod
    def delta_params(self, adapter: str) -> tuple[Tensor, ...]:
        """The tensors `delta_fn` takes; gradients flow to these."""

    @abstractmethod
    def delta_fn(self, adapter: str) -> DeltaFn:
        """A pure function from `delta_params` to the update (O, I), without `scaling`."""

    def delta_state(self, adapter: str) -> tuple[Tensor, ...]:
        """Tensors other than the parameters that the update depends on."""
        return ()

    @classmethod
    def norm_bound(cls, config: Any, tensors: Mapping[str, Tensor]) -> float:
        """At least an update's Frobenius norm at any level, scale included; infinite if unknown.

        Args:
            config: The adapter's settings.
            tensors: Its parameters and buffers in one layer, by container.
        """
        return math.inf

    @classmethod
    def check_stored(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Refuse values that no layer of the method has, such as positions out of range.

        Args:
            tensors: What a file holds of one layer, by container; shapes are checked already.
            shape: (O, I) of the layer.

        Raises:
            ValueError: Tells the tensor, what was expected and what came.
        """

    def on_training_forward(self, adapter: str) -> None:
        """Called before an update that will be differentiated."""

    # The update

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of one adapter as it is applied, scale included: (O, I), float32 or float64.

        Differentiable in the adapter's parameters.
        """
        fn, params = self._combined((adapter,))
        return fn(*params)

    def update_size(self, adapter: str) -> float:
        """Frobenius norm of an adapter's update as it is applied."""
        with torch.no_grad(), self._onloaded():
            return float(torch.linalg.vector_norm(self.get_delta_weight(adapter)))

    def _combined(
        self, adapters: Sequence[str], scales: dict[str, float] | None = None
    ) -> tuple[BlockUpdate, tuple[Tensor, ...]]:
        """One pure function of all adapters' parameters: their scaled updates, summed."""
        scales = scales or self.scaling
        parts: list[tuple[BlockUpdate, int, float]] = []
        params: list[Tensor] = []
        for name in adapters:
            update, own = self.delta_fn(name), self.delta_params(name)
            update = update if isinstance(update, BlockUpdate) else WholeUpdate(update)
            parts.append((update, len(own), scales[name]))
            params += own
        if len(parts) == 1 and parts[0][2] == 1.0:
            return parts[0][0], tuple(params)
        return ScaledSum(parts), tuple(params)

    def clear_cache(self) -> None:
        """Release the kept weight; needed after writing through the data of a frozen tensor."""
        self._kept = None

    def reread(self, adapter: str) -> None:
        """Bring what is remembered of an adapter's tensors up to date after they were written to.

        Plain calls notice by themselves; compiled ones cannot look.
        """
        self.clear_cache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # Moving and casting change a parameter's data without counting as a change of version.
        self.clear_cache()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "DeltaLayer":
        self.clear_cache()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "ready": None}

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        # Compiled code looks at nothing that other calls leave behind.
        if torch.compiler.is_compiling() or args or kwargs or self._disable_adapters:
            return self._forward(x, *args, **kwargs)
        kept = self._kept
        if kept is not None and not self.training:
            if kept.holds(self, x):
                return kept(x)
            self.clear_cache()
        base: Any = self._modules["base_layer"]
        if self.ready is not None and self.ready.serves(self, x):
            return self.operation()(x, self.ready.weight, base.bias)
        stock = self.merged_adapters and type(base).forward is self.stock.forward
        if stock and untouched(base):
            return self.operation()(x, base.weight, base.bias)
        return self._forward(x)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.acting()
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        with self._onloaded():
            if self._in_inference(adapters):
                made = effective_weight(self, x, adapters, fold=not (args or kwargs))
                if made.kept and not (args or kwargs):
                    self._kept = made
                return made(x, *args, **kwargs)
            if self.training and self._drops(adapters):
                return self._forward_dropout(x, adapters, *args, **kwargs)
            if args or kwargs or not self.is_plain():
                return self.base_layer(x, *args, **kwargs) + self._product(x, adapters)
            linear = self.get_base_layer()
            return self._product(x, adapters, linear.weight, linear.bias, self._folds(x.device))

    def acting(self) -> tuple[str, ...]:
        """The active adapters that are here and whose scale is not zero."""
        return tuple(name for name in self._applicable() if self.scaling[name] != 0)

    def _drops(self, adapters: Sequence[str]) -> bool:
        return any(self.configs[name].dropout > 0 for name in adapters)

    def idle(self, adapters: Sequence[str]) -> bool:
        """Whether a call would not use the whole update: switched off, in the weight, dropout."""
        return bool(self.disable_adapters or self.merged) or self._drops(adapters)

    def trains_folded(self) -> bool:
        """Whether training is one product with W0 + ΔW and nothing else."""
        return self.is_plain() and self._folds(self.get_base_layer().weight.device)

    def _in_inference(self, adapters: tuple[str, ...]) -> bool:
        """Whether nothing but the input can be differentiated."""
        if self.training or torch.compiler.is_compiling():
            return False
        if not torch.is_grad_enabled():
            return True
        frozen = not any(t.requires_grad for a in adapters for t in self.delta_params(a))
        frozen = frozen and not any(t.requires_grad for t in self.get_base_layer().parameters())
        # Not kept, each layer's weight would stay in memory until the backward pass.
        return frozen and may_keep(self, adapters, self.is_plain())

    def _forward_dropout(
        self, x: Tensor, adapters: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in adapters:
            y = y + self._product(F.dropout(x, self.configs[name].dropout), (name,))
        return y

    def _product(
        self,
        x: Tensor,
        adapters: tuple[str, ...],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        folds: bool = True,
    ) -> Tensor:
        """x (W + ΔW)ᵀ + b; without a weight, x ΔWᵀ."""
        if self.training and torch.is_grad_enabled():
            for name in adapters:
                self.on_training_forward(name)
        update, params = self._combined(adapters)
        return self.multiply_trained(x, weight, bias, update, params, folds)

    def _folds(self, device: torch.device) -> bool:
        halves = self.base_layer.weight.dtype in HALVES or lowered_to(device.type) is not None
        return self.fold_16bit is True or not halves

    def _onloaded(self) -> AbstractContextManager[None]:
        return onloaded(child for _, child in self.containers())

    # Merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W0 + Σ s_a ΔW_a into the base weight, summed in float32, keeping a copy of W0.

        Args:
            safe_merge: Refuse, before anything is written, if the result is not finite.
            adapter_names: Which adapters; None takes the active ones. Those not here are left out.

        Raises:
            ValueError: The result is not finite (`safe_merge`), or the base weight is quantized.
        """
        self.clear_cache()  # also where nothing is merged: another tuner's merge may come first
        asked = check_adapters_to_merge(self, adapter_names)
        adapters = [name for name in asked if name in self.configs]
        if not adapters:
            return
        merged, error = merge(self, adapters, safe_merge)
        self._merged = merged if self._merged is None else self._merged.then(merged)
        self.merge_error.update(dict.fromkeys(adapters, error))
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit, and every adapter's own scale.

        Only if someone else has changed the weight since `merge` (another tuner merged into it too)
        is the update subtracted instead, which is exact to rounding.
        """
        self.clear_cache()
        if self._merged is None:
            warnings.warn("nothing is merged into this layer, nothing to unmerge", stacklevel=2)
            return
        unmerge(self, self._merged)
        self._merged = None
        self.merged_adapters.clear()
        self.merge_error.clear()
        # diffusers fuses at a strength by scale_layer and never takes it back.
        self.unscale_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__module__.rpartition('.')[2]}.{super().__repr__()}"
