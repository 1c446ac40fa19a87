"""The first phase of a load: everything that could fail is tried where nothing can be damaged.

An adapter is rebuilt on a skeleton: stand-ins of the adapted modules, one of each form, with the
real tuner layers around them. The model itself is only looked at: first whether it is the base,
then names and shapes, then how large the updates are.
"""

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion.adapters.attach import (
    adaptable,
    base_modules,
    fill,
    form_in,
    form_of,
    inject,
    skeleton,
    stand_in,
    zero_layer,
)
from snell_diffusion.adapters.identity import config_hash
from snell_diffusion.adapters.proportion import check_filled, check_update
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.schema import Component, Layer
from snell_diffusion.adapters.state import config_from, layer_tensors, stored_shape
from snell_diffusion.errors import (
    SnellaBaseError,
    SnellaKeyError,
    SnellaShapeError,
    SnellaValueError,
    printable,
    quoted,
    shown,
)
from snell_diffusion.tuners import METHODS, delta_layers
from snell_diffusion.tuners.bypass import BYPASSED, is_bypassed
from snell_diffusion.tuners.qkv_guard import is_fused
from snell_diffusion.tuners.traverse import unwrapped
from snell_diffusion.tuners.weights import device_of, has_plain_weight

__all__ = ["check_base", "check_updates", "rehearse", "trained_on"]


def trained_on(part: Component) -> str:
    """What a component was trained on, for messages."""
    return f"{len(part.layers)} layers of a {printable(part.base.model) if part.base else 'model'}"


def check_base(model: nn.Module, component: str, file: AdapterFile, allow_other: bool) -> bool:
    """Whether the base is the one the adapter was trained on.

    Raises:
        SnellaBaseError: It is not, and another is not allowed.
    """
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


def rehearse(
    model: nn.Module, component: str, file: AdapterFile, adapter_name: str
) -> tuple[dict[str, nn.Module], nn.Module | None]:
    """The base layers of one component's adapter, every name and shape checked.

    On a skeleton with one layer of each form, where layers of one form have the same tensors; with
    one for every layer of methods where they have not. That skeleton comes back too, filled.

    Raises:
        SnellaKeyError: A module is not there, or tensors are missing or unknown.
        SnellaShapeError: A module or tensor has another size.
        SnellaConfigError: Settings this version does not know.
        SnellaValueError: A layer that is merged, offloaded or bypassed, or values of no adapter.
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


def check_updates(
    layers: Mapping[str, nn.Module],
    shadow: nn.Module | None,
    component: str,
    file: AdapterFile,
    bound: float,
) -> None:
    """Refuse updates out of proportion.

    Args:
        layers: Base layers by path, and the filled skeleton if there is one, as of `rehearse`.
        bound: Largest accepted |ΔW| / |W| of a layer.

    Raises:
        SnellaValueError: A larger update, or one that is not finite.
    """
    config = config_from(file.header.components[component], component)
    if shadow is not None:
        for path, layer in delta_layers(shadow):
            check_filled(layer, bound, f"{file.source}: layer {component}.{path}")
        return
    for path, base in layers.items():
        name = f"{component}.{path}"
        check_update(base, config, file.by_layer[name], bound, f"{file.source}: layer {name}")


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
            f"({trained_on(part)})"
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
