"""What SPT-LoRA and SPT-Adapter share: single entries, vectors, norms, placement.

    W = W0 + scale · scatter(v)     at the selection's positions, v from 0; biases and norms alike
    whole vectors: bias + scale · δ, δ from 0                    SPT (arXiv:2303.08566)

Shape legend: I in features, O out features, n entries. The structured module, which is where the
two methods differ, is in spt_lora.py and spt_adapter.py.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from snell_diffusion.core import ScaledSum, WholeUpdate
from snell_diffusion.core.precision import HALVES, full
from snell_diffusion.core.sensitivity import scatter
from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.tuners.base import DeltaConfig
from snell_diffusion.tuners.containers import PreciseBufferDict, PreciseParameterDict
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.placement import PlacedModel
from snell_diffusion.tuners.roles import role_of
from snell_diffusion.tuners.spt_config import KINDS, TUNED, SptConfig
from snell_diffusion.tuners.spt_selection import is_norm
from snell_diffusion.tuners.transform import TransformLayer
from snell_diffusion.tuners.traverse import innermost

__all__ = ["SptLayer", "SptModel", "SptNorm", "names_of"]

PLACES = ("positions", "bias_positions")


class SptLayer(TransformLayer):
    """A Linear with single entries, a whole bias and a structured module of some adapters.

    Which of these it has, its adapter's selection says. `parts` are the structured module's tensors
    by name without the prefix.
    """

    prefix: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    adapter_layer_names: tuple[str, ...]
    alike = False

    def add_containers(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, PreciseParameterDict())
        for name in PLACES:
            setattr(self, self.prefix + name, PreciseBufferDict())

    def adopt(self, key: str) -> None:
        super().adopt(key)
        self.path, self.role = key, role_of(key)

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        assert isinstance(config, SptConfig)
        chosen = config.chosen
        if chosen is None or self.path in chosen.structured:
            module = self.fresh_module(config, generator)
            for name, tensor in zip(self.parts, module, strict=True):
                self.held(name)[adapter] = nn.Parameter(tensor)
        if chosen is None:
            return
        for kind, entries, places in zip(KINDS, TUNED[:2], PLACES, strict=True):
            path = f"{self.path}.{kind}"
            if path in chosen.vectors:
                self.held(kind)[adapter] = nn.Parameter(torch.zeros(self._shape(kind, path)))
            if count := chosen.count(path):
                positions, numel = chosen.positions(path), self._shape(kind, path).numel()
                if int(positions.max()) >= numel:
                    raise SnellaConfigError(
                        f"selection's entries of {path} must be below {numel}, the size of this "
                        f"model's, got {int(positions.max())}: it is for another model"
                    )
                self.held(entries)[adapter] = nn.Parameter(torch.zeros(count))
                self.held(places)[adapter] = positions

    @classmethod
    def check_stored(cls, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        for places, sizes in zip(PLACES, (shape, shape[:1]), strict=True):
            positions = tensors.get(cls.prefix + places)
            if positions is None:
                continue
            numel = math.prod(sizes)
            whole = positions.long()
            inside = bool(((whole >= 0) & (whole < numel)).all())
            if positions.is_floating_point() or not inside or len(whole.unique()) < len(whole):
                raise ValueError(
                    f"tensor '{cls.prefix}{places}': expected different whole numbers, 0 to "
                    f"{numel - 1}, the places of single weights, got {positions.dtype} from "
                    f"{positions.min()} to {positions.max()}"
                )

    @abstractmethod
    def fresh_module(
        self, config: SptConfig, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        """The structured module's tensors in the order of `parts`, float32 on the CPU."""

    @abstractmethod
    def branch(self, x: Tensor, y: Tensor, adapter: str) -> Tensor:
        """What an adapter's structured module adds, [..., O]: x the layer's input, y its output."""

    def held(self, name: str) -> Any:
        """A container by its name without the prefix."""
        return getattr(self, self.prefix + name)

    def transformed(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        y = self._with_entries(x, adapters, *args, **kwargs)
        added = [
            (self.scaling[name] * self.branch(x, y, name)).to(y.dtype)
            for name in adapters
            if name in self.held("down")
        ]
        return y + sum(added) if added else y

    def change(self, kind: str, adapters: Sequence[str]) -> Tensor | None:
        """What entries and vectors of some adapters add to weight or bias, scale included."""
        places, entries = dict(zip(KINDS, zip(PLACES, TUNED[:2], strict=True), strict=True))[kind]
        total: Tensor | None = None
        for name in adapters:
            own = [self.held(kind)[name]] if name in self.held(kind) else []
            if name in self.held(entries):
                shape = self._shape(kind, f"{self.path}.{kind}")
                own.append(scatter(self.held(entries)[name], self.held(places)[name], shape))
            for change in own:
                scaled = self.scaling[name] * change
                total = scaled if total is None else total + scaled
        return total

    def merged_parameters(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        base, merged = self.get_base_layer(), {}
        for kind in KINDS:
            change = self.change(kind, adapters)
            if change is not None:
                merged[kind] = full(getattr(base, kind)) + change
        return merged

    def _with_entries(
        self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The base's call with single entries and the bias's change."""
        entries, places = self.held("entries"), self.held("positions")
        shape = torch.Size((self.out_features, self.in_features))
        owners = [name for name in adapters if name in entries]
        update = ScaledSum([(_Entries(places[a], shape), 1, self.scaling[a]) for a in owners])
        values = [entries[name] for name in owners]
        more = self.change("bias", adapters)
        if args or kwargs or not self.is_plain():
            y = self.base_layer(x, *args, **kwargs)
            if owners:
                y = y + self.multiply_trained(x, None, None, update, values, True)
            return y if more is None else y + more.to(y.dtype)
        linear = self.get_base_layer()
        bias: Tensor | None = linear.bias
        if bias is not None and more is not None and bias.dtype not in HALVES:
            bias, more = bias + more, None
        if owners:
            folds = self._folds(x.device)
            y = self.multiply_trained(x, linear.weight, bias, update, values, folds)
        else:
            y = self.operation()(x, linear.weight, bias)
        return y if more is None else y + more.to(y.dtype)

    def _shape(self, kind: str, path: str) -> torch.Size:
        found = getattr(self.get_base_layer(), kind, None)
        if not isinstance(found, Tensor):
            raise SnellaConfigError(
                f"selection names {path}, which this model does not have: it is for another model"
            )
        return torch.Size(self.weight_shape()) if kind == "weight" else found.shape


class SptNorm(SptLayer):
    """A norm with single entries or whole vectors tuned; combine it with a method's layer.

    The public code counts entries of norms in the budget and then has no layer that receives them;
    here they are tuned.
    """

    kind = "norm"

    def adopt(self, key: str) -> None:
        norm = self.get_base_layer()
        self.out_features, self.in_features = len(norm.weight), 1
        self.path, self.role = key, None

    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    def writable(self) -> bool:
        weight = self.get_base_layer().weight
        return type(weight) is nn.Parameter and weight.is_floating_point()

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        assert isinstance(config, SptConfig)
        if config.chosen is None or self.path in config.chosen.structured:
            raise SnellaConfigError(
                f"{config.method} has structured modules for Linear layers, and {self.path} is a "
                f"{type(self.get_base_layer()).__name__}: leave it out of target_modules"
            )
        super().create_tensors(adapter, config, generator)

    def transformed(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        new = {
            name: value.to(getattr(base, name).dtype)
            for name, value in SptLayer.merged_parameters(self, adapters).items()
        }
        y: Tensor = functional_call(base, new, (x, *args), kwargs)
        return y


class SptModel(PlacedModel):
    """PEFT's model class for both; `norm_layer_cls` is the method's layer for norms."""

    norm_layer_cls: type[SptNorm]
    no_convolutions = "{method} tunes Linear layers and norms"

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.wants_selection:
            raise SnellaConfigError(
                f"{peft_config.method} with a budget chooses what to tune by a sensitivity pass: "
                "run config.selected(model, losses) first and adapt the model with what it "
                "returns, or leave budget out to tune every target layer"
            )
        if peft_config.chosen is not None:
            peft_config.target_modules = peft_config.chosen.modules()
            there = {path for path, _ in model.named_modules()}
            if missing := set(peft_config.target_modules) - there:
                raise SnellaConfigError(
                    f"selection names {shown(missing)}, which this {type(model).__name__} does not "
                    "have: it is for another model"
                )
        super()._prepare_model(peft_config, model)

    def _adapt(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        chosen = peft_config.chosen
        if chosen is not None and current_key not in chosen.modules():
            return  # PEFT matches endings: another module's path may end in a chosen one
        super()._adapt(peft_config, adapter_name, target, target_name, parent, current_key)

    def _layer_class(self, target: nn.Module) -> type[DeltaLayer]:
        return self.norm_layer_cls if is_norm(innermost(target)) else self.tuner_layer_cls


class _Entries(WholeUpdate):
    """The update that single entries are, [O, I]: a function of their values."""

    def __init__(self, positions: Tensor, shape: torch.Size) -> None:
        super().__init__(lambda values: scatter(values, positions, shape))


def names_of(prefix: str, parts: Sequence[str]) -> tuple[str, ...]:
    """The parameter containers of a method: its structured module's, then what both have."""
    return tuple(prefix + name for name in (*parts, *TUNED))
