"""Adapters into live models in two phases: check everything, then put in all parts or none.

Phase one rebuilds the adapter on a skeleton: stand-ins of the adapted modules, one of each form,
with the real tuner layers around them. What could fail on the model fails there, while the model is
only looked at: names and shapes of all components first, then how large the updates are. Phase two
repeats the same steps on the model; should anything fail even then, what was put in is taken out
again.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.attach import (
    activate,
    adaptable,
    base_modules,
    fill,
    forget,
    form_in,
    form_of,
    inject,
    remove_adapter,
    skeleton,
    stand_in,
    uncollected,
    zero_layer,
)
from snell_diffusion.adapters.identity import config_hash
from snell_diffusion.adapters.inspect import numbers_of
from snell_diffusion.adapters.proportion import (
    check_filled,
    check_update,
    measured_update,
    relative_change,
)
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.schema import Component, Layer
from snell_diffusion.adapters.state import Components, config_from, layer_tensors, stored_shape
from snell_diffusion.adapters.tokens import (
    Tokenizers,
    check_tokens,
    put_in_tokens,
    remove_tokens,
)
from snell_diffusion.errors import (
    SnellaBaseError,
    SnellaKeyError,
    SnellaShapeError,
    SnellaValueError,
    printable,
    quoted,
    shown,
)
from snell_diffusion.tuners import METHODS, DeltaLayer, delta_layers
from snell_diffusion.tuners.bypass import BYPASSED, is_bypassed
from snell_diffusion.tuners.qkv_guard import is_fused
from snell_diffusion.tuners.traverse import every_module, unwrapped
from snell_diffusion.tuners.weights import device_of, has_plain_weight

__all__ = ["LoadReport", "check_adapter_name", "load_adapter"]


@dataclass(frozen=True)
class LoadReport:
    """What a load has done.

    Attributes:
        adapter_name: The name it was loaded under.
        source: The file, hub id or "state dict" it came from.
        layers: Adapted layers by component.
        tensors: How many tensors were read.
        parameters: How many numbers the factors hold.
        base_matches: By component, whether class and config hash are those it was trained on.
        words: The new words that prompts may use.
    """

    adapter_name: str
    source: str
    layers: dict[str, int]
    tensors: int
    parameters: int
    base_matches: dict[str, bool]
    words: tuple[str, ...] = ()
    _live: tuple[weakref.ref[DeltaLayer], ...] = field(default=(), repr=False, compare=False)

    @cached_property
    def largest_update(self) -> float:
        """max over layers of |ΔW| / |W| (Frobenius norms), with no entry of ΔW dropped, where it is
        largest; 0 where W is quantized. One evaluation of every update, at the first look.

        Raises:
            SnellaKeyError: The adapter has been taken out since.
        """
        largest = 0.0
        for reference in self._live:
            layer = reference()
            if layer is None or self.adapter_name not in layer.configs:
                raise SnellaKeyError(
                    f"{self.adapter_name!r} has been unloaded: its updates can be measured only "
                    "while it is there, load it again"
                )
            settings = ("_sparsity", "_threshold")
            tensors = {
                short: tensor.detach()
                for short, tensor in layer_tensors(layer, self.adapter_name).items()
                if not short.endswith(settings)
            }
            if not type(layer).alike:
                largest = max(largest, relative_change(layer, self.adapter_name))
                continue
            config = layer.configs[self.adapter_name]
            largest = max(largest, measured_update(layer.get_base_layer(), config, tensors))
        return largest


@uncollected()
def load_adapter(
    components: Components,
    file: AdapterFile,
    adapter_name: str = "default",
    allow_other_base: bool = False,
    max_relative_update: float = limits.MAX_RELATIVE_UPDATE,
    tokenizers: Tokenizers | None = None,
) -> LoadReport:
    """Put a read adapter into live models and make it the only active one of our methods.

    Args:
        components: Models by the names the file uses, e.g. {"unet": pipe.unet}.
        adapter_name: Letters, digits, "_" and "-", up to 64; not taken.
        allow_other_base: Load although a component's class or config hash differs from the one
            the adapter was trained on. Every layer must still be there with the same shape.
        max_relative_update: Largest accepted |ΔW| / |W| of a layer (Frobenius norms), at any
            sparsity level, and of a new word's embedding against the base's longest.
        tokenizers: By their names in the pipeline; an adapter with new words needs them.

    Raises:
        SnellaKeyError: A component or module of the file is not there, tensors are missing or
            unknown, or the name is taken.
        SnellaShapeError: A module or tensor has another size.
        SnellaBaseError: Another base model.
        SnellaConfigError: Settings this version does not know.
        SnellaValueError: A bad name, a merged or offloaded layer, an update beyond the bound.

        After any of them the models are as they were.
    """
    check_adapter_name(adapter_name)
    for component, part in file.header.components.items():
        if component not in components:
            raise SnellaKeyError(
                f"{file.source}: adapts {component!r} ({_trained_on(part)}), expected one of "
                f"{shown(components) or 'no component at all'}: load it into a pipeline of the "
                "kind it was trained for"
            )
    if not max_relative_update > 0:
        raise SnellaValueError(
            f"max_relative_update: expected a number above 0, got {max_relative_update!r}; leave "
            f"it out for {limits.MAX_RELATIVE_UPDATE:g}"
        )
    check_free(components, adapter_name)
    parts = {name: components[name] for name in file.header.components}
    matches = {
        name: _check_base(model, name, file, allow_other_base) for name, model in parts.items()
    }
    rehearsed = {name: _rehearse(model, name, file, adapter_name) for name, model in parts.items()}
    for name, (layers, shadow) in rehearsed.items():
        _check_updates(layers, shadow, name, file, max_relative_update)
    tokens = file.header.tokens
    if tokens is not None:
        check_tokens(
            *(components, tokenizers, tokens, file.tensors, file.source),
            *(allow_other_base, max_relative_update),
        )
    _commit(components, parts, file, adapter_name, tokenizers or {})
    return LoadReport(
        adapter_name=adapter_name,
        source=file.source,
        layers={name: len(part.layers) for name, part in file.header.components.items()},
        tensors=len(file.tensors),
        parameters=sum(map(numbers_of, file.header.components.values())),
        base_matches=matches,
        words=() if tokens is None else tuple(word.text for word in tokens.words),
        _live=tuple(
            weakref.ref(layer)
            for model in parts.values()
            for _, layer in delta_layers(model, adapter_name)
        ),
    )


def check_adapter_name(name: object) -> None:
    """Refuse what cannot name an adapter.

    Raises:
        SnellaValueError: Not a plain name of 1 to 64 characters, or a name torch itself uses.
    """
    if not isinstance(name, str) or not limits.ADAPTER_NAME.fullmatch(name):
        raise SnellaValueError(
            f"adapter_name: expected 1 to 64 letters, digits, '_' or '-', got {quoted(name)}; "
            "choose another"
        )
    if hasattr(nn.ParameterDict(), name):
        raise SnellaValueError(
            f"adapter_name: expected a name that torch does not use itself, got {name!r}; choose "
            f"another, e.g. 'my_{name}'"
        )


def check_free(components: Components, adapter_name: str) -> None:
    """Refuse a name that any tuner, ours or another, has on any of the models.

    Raises:
        SnellaKeyError: The name is taken.
    """
    for component, model in components.items():
        taken = set(getattr(unwrapped(model), "peft_config", None) or {})
        for module in every_module(model):
            if isinstance(module, BaseTunerLayer):
                taken.update(module._get_available_adapters())
        if adapter_name in taken:
            raise SnellaKeyError(
                f"adapter name {adapter_name!r} is already in use on {component!r} "
                f"(there: {shown(taken)}): choose another adapter_name or unload that one first"
            )


def _trained_on(part: Component) -> str:
    return f"{len(part.layers)} layers of a {printable(part.base.model) if part.base else 'model'}"


def _check_base(model: nn.Module, component: str, file: AdapterFile, allow_other: bool) -> bool:
    """Whether the base is the one the adapter was trained on; raises if not and not allowed."""
    part, named = file.header.components[component], file.header.origin.source
    if part.base is None:
        return False
    base = unwrapped(model)
    came, expected = type(base).__name__, part.base.model
    if came == expected and config_hash(base) == part.base.config_hash:
        return True
    if allow_other:
        return False
    field = "class" if came != expected else "config_hash"
    what = (
        f"expected {came} as in this pipeline, got {quoted(expected)}, on which it was trained"
        if came != expected
        else f"expected {config_hash(base)[:12]}... as of this {came}, got "
        f"{part.base.config_hash[:12]}...: it was trained on a {came} with other settings"
    )
    hint = (
        _misfits(model, part)
        or "all its layers fit: load the base it was trained on, or pass allow_other_base=True"
    )
    raise SnellaBaseError(
        f"{file.source}: header field 'components.{component}.base.{field}': {what}; {hint}"
        + (f" (the file names {quoted(named)})" if named else "")
    )


def _misfits(model: nn.Module, part: Component) -> str:
    """The first difference between a model's modules and a layer table, empty if there is none."""
    modules = base_modules(model)
    for path, row in part.layers.items():
        layer = adaptable(modules.get(path))
        if layer is None:
            return f"this model has no Linear {path!r}: load the base it was trained on"
        came, wanted = _form(form_of(layer)), _form(form_in(row))
        if came != wanted:
            wanted = wanted.removeprefix("[out, in] = ")
            return f"{path!r} is {came} here, {wanted} in the file: load the base it was trained on"
    return ""


def _form(form: Mapping[str, Any]) -> str:
    """A layer's form in words."""
    if form["kind"] == "norm":
        return f"a norm of {form['shape'][0]}"
    if form["kind"] == "linear":
        return f"[out, in] = {form['shape']}"
    height, width = form["kernel"]
    return f"[out, in] = {form['shape']} of a {height}x{width} kernel with groups={form['groups']}"


def _rehearse(
    model: nn.Module, component: str, file: AdapterFile, adapter_name: str
) -> tuple[dict[str, nn.Module], nn.Module | None]:
    """The base layers of one component's adapter, every name and shape checked.

    On a skeleton with one layer of each form, where layers of one form have the same tensors; with
    one for every layer of methods where they have not. That skeleton comes back too, filled.
    """
    part = file.header.components[component]
    layers = _check_modules(model, component, part, file.source)
    config = config_from(part, f"{file.source}: header field 'components.{component}")
    kind = METHODS[config.method].model.tuner_layer_cls
    if kind.alike:
        _rehearse_forms(part, component, file, config, adapter_name)
        return layers, None
    shadow = skeleton({p: stand_in(x, has_plain_weight(x)) for p, x in layers.items()})
    try:
        inject(shadow, config, layers, adapter_name)
    except ValueError as error:
        raise SnellaShapeError(
            f"{file.source}: header field 'components.{component}': {error}; load the base it was "
            "trained on"
        ) from error
    live = dict(delta_layers(shadow))
    for path, row in part.layers.items():
        tensors = file.by_layer.get(f"{component}.{path}", {})
        place = f"{file.source}: layer {component}.{path}"
        _check_tensors(layer_tensors(live[path], adapter_name), tensors, row, place)
        try:
            type(live[path]).check_stored(tensors, row.shape)
        except ValueError as error:
            raise SnellaValueError(f"{place}: {error}; use another checkpoint") from error
        fill(live[path], adapter_name, tensors)
    return layers, shadow


def _rehearse_forms(
    part: Component, component: str, file: AdapterFile, config: Any, adapter_name: str
) -> None:
    firsts: dict[str, str] = {}
    for path, row in part.layers.items():
        firsts.setdefault(_form(form_in(row)), path)
    leaves = {path: zero_layer(form_in(part.layers[path])) for path in firsts.values()}
    shadow = skeleton(leaves)
    inject(shadow, config, leaves, adapter_name)
    live = {path: layer_tensors(layer, adapter_name) for path, layer in delta_layers(shadow)}
    for path, row in part.layers.items():
        tensors = file.by_layer.get(f"{component}.{path}", {})
        place = f"{file.source}: layer {component}.{path}"
        _check_tensors(live[firsts[_form(form_in(row))]], tensors, row, place)


def _check_updates(
    layers: Mapping[str, nn.Module],
    shadow: nn.Module | None,
    component: str,
    file: AdapterFile,
    bound: float,
) -> None:
    config = config_from(file.header.components[component], component)
    if shadow is not None:
        for path, layer in delta_layers(shadow):
            check_filled(layer, bound, f"{file.source}: layer {component}.{path}")
        return
    for path, base in layers.items():
        name = f"{component}.{path}"
        check_update(base, config, file.by_layer[name], bound, f"{file.source}: layer {name}")


def _check_modules(
    model: nn.Module, component: str, part: Component, source: str
) -> dict[str, nn.Module]:
    if is_fused(model):
        raise SnellaValueError(
            f"{component} computes with fused QKV projections, where an update would be left out: "
            "call unfuse_qkv_projections() before loading an adapter"
        )
    modules = base_modules(model)
    missing = [path for path in part.layers if adaptable(modules.get(path)) is None]
    if missing:
        raise SnellaKeyError(
            f"{source}: header field 'components.{component}.layers': expected Linear layers of "
            f"this {type(unwrapped(model)).__name__}, got {len(missing)} of {len(part.layers)} "
            f"that are none: {shown(missing, 4)}; load the base it was trained on "
            f"({_trained_on(part)})"
        )
    layers = {}
    for path, row in part.layers.items():
        module, layer = modules[path], adaptable(modules[path])
        assert layer is not None
        expected, came = form_of(layer), form_in(row)
        if came != expected:
            raise SnellaShapeError(
                f"{source}: layer {component}.{path}: expected {_form(expected)} as in this model, "
                f"got {_form(came).removeprefix('[out, in] = ')}; the adapter is for another model "
                "size: load the base it was trained on"
            )
        if device_of(layer).type == "meta":
            raise SnellaValueError(
                f"{component}.{path} has no weights in memory (offloaded to meta): load the "
                "adapter before the weights are offloaded"
            )
        owner, _, name = path.rpartition(".")
        if is_bypassed(modules[owner], name):
            raise SnellaValueError(
                f"{source}: layer {component}.{path}: {type(modules[owner]).__name__} {BYPASSED}; "
                "train the adapter again without this layer"
            )
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise SnellaValueError(
                f"{component}.{path} has adapter(s) {shown(module.merged_adapters)} merged into "
                "its weight: unfuse (unfuse_snella or unfuse_lora) before loading another"
            )
        layers[path] = layer
    return layers


def _check_tensors(
    live: Mapping[str, Tensor], tensors: Mapping[str, Tensor], row: Layer, place: str
) -> None:
    optional = {name for name in live if name.endswith("_threshold")}
    missing = live.keys() - tensors.keys() - optional
    unknown = tensors.keys() - live.keys()
    if missing or unknown:
        raise SnellaKeyError(
            f"{place}: expected the tensors {shown(live.keys() - optional)}, missing: "
            f"{shown(missing) or 'none'}, unknown: {shown(map(quoted, unknown)) or 'none'}; the "
            "file is incomplete or of another version: get it again, or upgrade snell_diffusion"
        )
    sizes = "" if row.r is None else f" with r={row.r}, heads={row.heads}"
    for name, tensor in tensors.items():
        expected = stored_shape(name, live[name])
        if tensor.shape != expected:
            raise SnellaShapeError(
                f"{place}: tensor {name!r}: expected shape {list(expected)} for a layer of "
                f"{row.shape[1]} inputs and {row.shape[0]} outputs{sizes}, got "
                f"{list(tensor.shape)}; the file was changed after it was "
                "written: get it again"
            )


def _commit(
    components: Components,
    parts: Components,
    file: AdapterFile,
    adapter_name: str,
    tokenizers: Tokenizers,
) -> None:
    """Phase two. A failure here would be a bug of ours; the models are restored all the same."""
    active = {
        layer: layer.active_adapters[:]
        for model in components.values()
        for _, layer in delta_layers(model)
    }
    try:
        for component, model in parts.items():
            part = file.header.components[component]
            config = config_from(part, component)
            inject(model, config, part.layers, adapter_name)
            filled = set()
            for path, layer in delta_layers(model, adapter_name):
                fill(layer, adapter_name, file.by_layer.get(f"{component}.{path}", {}))
                filled.add(path)
            if filled != set(part.layers):
                raise SnellaKeyError(
                    f"{file.source}: method {part.method} does not adapt "
                    f"{shown(set(part.layers) - filled)} of {component}; load the base it was "
                    "trained on"
                )
        for model in components.values():
            activate(model, [adapter_name])
        if file.header.tokens is not None:
            put_in_tokens(components, tokenizers, file.header.tokens, file.tensors, adapter_name)
    except BaseException:
        remove_tokens(components, tokenizers, adapter_name)
        for model in parts.values():
            remove_adapter(model, adapter_name)
            forget(unwrapped(model), adapter_name)
        for layer, names in active.items():
            layer.set_adapter(names, inference_mode=True)
        raise
