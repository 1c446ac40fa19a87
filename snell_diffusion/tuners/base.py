"""The config and the model every method shares; the layer is in layer.py."""

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.tuners.bypass import BYPASSED, is_bypassed
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.qkv_guard import protect
from snell_diffusion.tuners.registry import MethodName
from snell_diffusion.tuners.traverse import delta_layers, innermost
from snell_diffusion.tuners.weights import TOLERATED_LOSS, is_linear_like

__all__ = ["DEFAULT_TARGETS", "DeltaConfig", "DeltaLayer", "DeltaModel", "Places"]

DEFAULT_TARGETS = (
    # diffusers attention: UNets, SD 3, FLUX and most others
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    # transformers: CLIP, T5-like encoders, ViT since transformers 5
    *("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "fc1", "fc2"),
    # transformers: ViT before 5
    *("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
"""Name endings adapted when `target_modules` is not set: those of them that the model has."""


@dataclass
class DeltaConfig(PeftConfig):
    """Settings every method of this package has.

    Raises:
        SnellaConfigError: (a ValueError) A value is out of range; names the field and the range.
    """

    method: ClassVar[str]
    default_roles: ClassVar[tuple[str, ...] | None] = None
    """Which layers the paper adapts, by `roles.ROLES`; None: all that a model's family names."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Fields that make the method what it is: they stay at their defaults."""
    not_saved: ClassVar[tuple[str, ...]] = ()
    """Fields that adapter files do not hold: they follow from the layers' tensors."""
    later: ClassVar[tuple[str, ...]] = ()
    """Fields that the first version of the method did not have: files hold them where they differ
    from their defaults."""

    r: int = field(
        default=32, metadata={"help": "rank: numbers per input and per output feature, 1 or more"}
    )
    scale: float = field(
        default=1.0,
        metadata={"help": "constant factor on the update, 1e-12 to 1e12 or its negative"},
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "share of the update's inputs dropped in training, 0 up to but not 1"},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers to adapt: a list of names or name endings, one regular "
            "expression for whole paths, 'all-linear', or nothing for the attention projections "
            "(and, in transformers models, the MLP) that the model has"
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "layers left out again, in the same form as target_modules"},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "modules trained in full and saved with the adapter, by name ending"},
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "makes a fresh adapter a function of this number and the layers' paths; "
            "without it torch's global random state is used"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName(self.method)
        for item in fields(self):
            if item.name in self.fixed and getattr(self, item.name) != item.default:
                raise SnellaConfigError(
                    f"{item.name} of {self.method} is {item.default!r}, got "
                    f"{getattr(self, item.name)!r}: leave it out, or use SNELLA, which has it"
                )
        check_int("r", self.r, at_least=1)
        check_number(
            "scale", self.scale, "1e-12 to 1e12 or its negative", lambda s: 1e-12 <= abs(s) <= 1e12
        )
        check_number("dropout", self.dropout, "0 or more and below 1", lambda p: 0 <= p < 1)
        if self.seed is not None:
            check_int("seed", self.seed, at_least=0)
        self.target_modules = checked_names("target_modules", self.target_modules)
        self.exclude_modules = checked_names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise SnellaConfigError(
                f"modules_to_save must be a list of module names, got {self.modules_to_save!r}"
            )

    @classmethod
    def stored(
        cls, settings: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> Self:
        """The config of an adapter that a file holds.

        Args:
            settings: Fields as the file has them.
            shapes: By the path of every adapted module, the shapes of its tensors by short name;
                none for methods whose shapes follow from the settings.

        Raises:
            SnellaConfigError: A value is out of range.
        """
        return cls(**settings, target_modules=list(shapes), inference_mode=True)


class Places(dict[str, Tensor]):
    """Literal module paths in place of a state dict: layers go there and nowhere else."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self.paths = tuple(paths)


class DeltaModel(BaseTuner):
    """Puts a method's layers into a model; all of PEFT's verbs work on the result.

    A method sets `prefix`, `tuner_layer_cls` for Linear and `conv_layer_cls`, a subclass of it, for
    Conv2d, or says in `no_convolutions` why it has none.
    """

    tuner_layer_cls: type[DeltaLayer]
    conv_layer_cls: type[DeltaLayer]
    no_convolutions: ClassVar[str | None] = None
    """What the method adapts instead, the start of the message that refuses one; `{method}` is the
    config's name of it. None: it takes convolutions."""
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        # Targets are chosen from the model's modules in _prepare_model, not from its type's name:
        # diffusers models have none.
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(model)
        elif peft_config.target_modules == "all-linear":
            wrapped = {path for path, _ in _tuner_layers(model)}
            _maybe_include_all_linear_layers(peft_config, model)
            names = {*peft_config.target_modules, *wrapped}
            peft_config.target_modules = sorted(names - _bypassed(model, names))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's; with `Places` straight to the modules, and nothing else of the model changes.

        PEFT looks at every module of a model for each that is wrapped already, which takes seconds
        for a second adapter on a large one.
        """
        if not isinstance(state_dict, Places):
            super().inject_adapter(
                *(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            )
            return
        config = self.peft_config[adapter_name]
        for path in state_dict.paths:
            owner, _, name = path.rpartition(".")
            parent = model.get_submodule(owner)
            self._create_and_replace(
                config, adapter_name, getattr(parent, name), name, parent, current_key=path
            )
        self.targeted_module_names = list(state_dict.paths)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """PEFT's entry for each target; what a method does otherwise is in its `_adapt`."""
        if self.no_convolutions is not None and isinstance(innermost(target), nn.Conv2d):
            reason = self.no_convolutions.format(method=peft_config.method)
            raise SnellaConfigError(
                f"{reason}, and target module {current_key!r} is a convolution: leave it out of "
                "target_modules"
            )
        self._adapt(peft_config, adapter_name, target, target_name, parent, current_key)

    def _adapt(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Wrap a module that the method takes, or add the adapter to the layer around it."""
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        if is_bypassed(parent, target_name):
            raise SnellaConfigError(
                f"target module {current_key!r} cannot be adapted: {type(parent).__name__} "
                f"{BYPASSED}; leave it out of target_modules"
            )
        layer = self._layer_class(target)(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # A layer puts its tensors next to the base's itself: there is nothing more to move.
        setattr(parent, child_name, new_module)

    def _layer_class(self, target: nn.Module) -> type[DeltaLayer]:
        """The method's layer for a module, which another tuner may have wrapped."""
        convolution = isinstance(innermost(target), nn.Conv2d)
        return self.conv_layer_cls if convolution else self.tuner_layer_cls

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        protect(model)
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        # A layer that another tuner wraps lies under its base_layer; files know nothing of that.
        module, dot, tensor = key.rpartition(f".{cls.prefix}")
        return f"{module.removesuffix('.base_layer')}{dot}{tensor}" if dot else key

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge all layers, or none if one of them cannot be; warns if 16 bits lose the update."""
        untouched = [layer for _, layer in delta_layers(self.model) if not layer.merged]
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except ValueError:
            for layer in untouched:
                if layer.merged:
                    layer.unmerge()
            raise
        warn_about_merge_error(self.model)

    def clear_cache(self) -> None:
        """Release the weights that layers keep for inference; the next call computes them again."""
        for _, layer in delta_layers(self.model):
            layer.clear_cache()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)


def default_targets(model: nn.Module) -> list[str]:
    """Those of `DEFAULT_TARGETS` that end the path of a Linear of the model, quantized or not.

    Raises:
        SnellaConfigError: The model has none of them.
    """
    names = {
        *(name for name, module in model.named_modules() if is_linear_like(module)),
        *(name for name, _ in _tuner_layers(model)),
    }
    names -= _bypassed(model, names)
    found = [
        target
        for target in DEFAULT_TARGETS
        if any(f".{name}".endswith(f".{target}") for name in names)
    ]
    if not found:
        examples = shown(sorted(names), 4) or "none: it has no Linear layer at all"
        raise SnellaConfigError(
            f"target_modules is not set and {type(model).__name__} has no Linear layer by a usual "
            f"name ({', '.join(DEFAULT_TARGETS[:8])}, ...); set target_modules to names of its "
            f"layers, for example {examples}"
        )
    return sorted(found)


def _bypassed(model: nn.Module, names: Collection[str]) -> set[str]:
    """Those of some module paths whose owner reads their weight itself."""
    owned = {path: path.rpartition(".") for path in names}
    return {
        path
        for path, (owner, _, name) in owned.items()
        if is_bypassed(model.get_submodule(owner), name)
    }


def warn_about_merge_error(model: nn.Module) -> None:
    """Warn once if rounding to the base's dtype lost more than 5 % of some layer's update."""
    errors = {
        path: max(layer.merge_error.values())
        for path, layer in delta_layers(model)
        if layer.merge_error
    }
    lossy = {path: error for path, error in errors.items() if error > TOLERATED_LOSS}
    if lossy:
        worst = max(lossy, key=lambda path: lossy[path])
        warnings.warn(
            f"merging lost part of the update in {len(lossy)} of {len(errors)} layers: rounding to "
            f"the base weights' dtype is off by {lossy[worst]:.0%} of the update in {worst}; keep "
            "the adapter unmerged or load the base model in float32",
            stacklevel=3,
        )


def config_field(kind: type, name: str, default: Any) -> Any:
    """A dataclass field as a parent config has it, with another default."""
    (parent,) = (item for item in fields(kind) if item.name == name)
    return field(default=default, metadata=parent.metadata)


def check_int(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise SnellaConfigError(f"{name} must be a whole number, {at_least} or more, got {value!r}")


def check_number(
    name: str, value: object, expected: str, valid: Callable[[float], bool] = lambda _: True
) -> None:
    number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    if not math.isfinite(number) or not valid(number):
        raise SnellaConfigError(f"{name} must be a number, {expected}, got {value!r}")


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    if value not in known:
        raise SnellaConfigError(f"{name} {value!r} is unknown; known: {', '.join(known)}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise SnellaConfigError(f"{name} must be true or false, got {value!r}")


def checked_names(name: str, value: Any) -> list[str] | str | None:
    """A regular expression as it is, other collections of names sorted without duplicates."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise SnellaConfigError(
                f"{name} {value!r} is not a regular expression ({error}); "
                "for names give a list of them"
            ) from None
        return value
    names = list(value)
    if not names or not all(isinstance(item, str) and item for item in names):
        raise SnellaConfigError(f"{name} must be a list of module names, got {value!r}")
    return sorted(set(names))


def _tuner_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not name.endswith(".base_layer")
    ]
