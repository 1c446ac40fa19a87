"""From live models to plain tensors and table rows: what one adapter consists of.

Names are `<component>.<module path>.<tensor>`, for example
`unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.snella_A`: the path is the one in the
base model, and the adapter's own name does not occur in it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.adapters.container import FETCH
from snell_diffusion.adapters.doubles import join_doubles, split_doubles
from snell_diffusion.adapters.schema import Component
from snell_diffusion.core.quantize import decode, encode
from snell_diffusion.errors import SnellaConfigError, SnellaKeyError, quoted, shown
from snell_diffusion.tuners import DeltaLayer, SnellaConfig, delta_layers

Components = Mapping[str, nn.Module]

# Which modules are adapted is told by the layer table, literally: a file brings no patterns. The
# rest is PEFT's own bookkeeping.
_NOT_SAVED = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "quantized",
    "revision",
    "target_modules",
    "task_type",
}


def adapter_layers(
    components: Components, adapter_name: str
) -> Iterator[tuple[str, str, DeltaLayer]]:
    """(component, module path, layer) of every layer that has the adapter, in traversal order."""
    for component, model in components.items():
        for path, layer in delta_layers(model, adapter_name):
            yield component, path, layer


def layer_tensors(layer: DeltaLayer, adapter_name: str) -> dict[str, Tensor]:
    """The live tensors of one adapter in one layer by their short names, e.g. `snella_A`."""
    return {
        name: container[adapter_name]
        for name, container in layer.containers()
        if adapter_name in container
    }


def is_double(short: str) -> bool:
    """Whether a layer's tensor is a float64 number in memory, three float32 parts in a file."""
    return short.endswith("_sparsity")


def stored_shape(short: str, live: Tensor) -> tuple[int, ...]:
    """The shape in a file of one of a layer's tensors."""
    return (*live.shape, 3) if is_double(short) else tuple(live.shape)


def live_value(short: str, stored: Tensor, place: str) -> Tensor:
    """One of a layer's tensors in memory, from what the file holds.

    Raises:
        SnellaValueError: Parts that make no number; the message names `place`.
    """
    return join_doubles(stored, place) if is_double(short) else stored


def adapter_state(
    components: Components, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A copy of one adapter's tensors on the CPU as a file holds them: float32, levels in parts.

    A threshold of NaN means "taken from the sparsity level"; it is left out, as every tensor of an
    adapter is finite. Factors of few bits have the values that the bits stand for.

    Args:
        dtype: Storage of the factor matrices; None is float32. With a 16-bit dtype, or few bits,
            thresholds are left out too: they belong to the unrounded factors.

    Raises:
        SnellaKeyError: No layer has an adapter of that name.
        SnellaValueError: A sparsity level too small for a file.
    """
    state: dict[str, Tensor] = {}
    for component, path, layer in adapter_layers(components, adapter_name):
        bits = bits_to_pack(layer.configs[adapter_name])
        for short, tensor in layer_tensors(layer, adapter_name).items():
            if short.endswith("_threshold") and (
                bool(tensor.isnan()) or dtype is not None or bits is not None
            ):
                continue
            name = f"{component}.{path}.{short}"
            tensor = tensor.detach().to("cpu")
            if is_double(short):
                state[name] = split_doubles(tensor, f"{name} of adapter {adapter_name!r}")
                continue
            if not tensor.is_floating_point():
                state[name] = tensor.to(torch.int64, copy=True)
                continue
            if bits is not None and short in type(layer).packed_names:
                state[name] = decode(*encode(tensor.float(), bits), bits, tensor.shape)
                continue
            narrow = dtype if tensor.dim() > 1 else None
            state[name] = tensor.to(dtype=narrow or torch.float32, copy=True)
    if not state:
        raise SnellaKeyError(
            f"no layer of {shown(components) or 'no component'} has a SNELLA adapter named "
            f"{adapter_name!r}; loaded: {shown(adapter_names(components)) or 'none'}"
        )
    return state


def bits_to_pack(config: Any) -> int | None:
    """How many bits per number the factors are stored in; None for plain floats.

    Those that came out of a file are final: a second rounding would change them.
    """
    bits = getattr(config, "bits", 32)
    return bits if bits < 32 and not config.quantized else None


def adapter_names(components: Components) -> list[str]:
    """Names of all adapters of our methods, in the order they were added."""
    names = dict.fromkeys(
        name
        for model in components.values()
        for _, layer in delta_layers(model)
        for name in layer.configs
    )
    return list(names)


def layer_row(layer: Any, adapter_name: str) -> dict[str, Any]:
    """One row of the layer table (`rows.Layer`)."""
    config = layer.configs[adapter_name]
    tensors = layer_tensors(layer, adapter_name)
    row = {**_kind_row(layer), "shape": [layer.out_features, layer.in_features]}
    if not isinstance(config, SnellaConfig):
        shapes = {short: list(tensor.shape) for short, tensor in sorted(tensors.items())}
        return {**row, "tensors": shapes}
    stored = tensors.get(f"{_prefix(config)}threshold")
    plain = bits_to_pack(config) is None
    threshold = None if stored is None or bool(stored.isnan()) or not plain else float(stored)
    return {
        **row,
        "r": layer.r[adapter_name],
        "heads": config.heads,
        "sparsity": layer.sparsity(adapter_name),
        "threshold": threshold,
        "kept": layer.kept(adapter_name),
    }


def _kind_row(layer: Any) -> dict[str, Any]:
    if layer.kind != "conv2d":
        return {"kind": layer.kind}
    conv = layer.get_base_layer()
    return {"kind": layer.kind, "kernel": list(conv.kernel_size), "groups": conv.groups}


def method_name(config: Any) -> str:
    """The method of a PEFT config as files spell it, e.g. `snella`, of which SNELL is a setting."""
    from snell_diffusion.tuners import METHODS

    return METHODS[config.peft_type.value].stored_as


def _prefix(config: Any) -> str:
    return f"{method_name(config)}_"


def config_row(config: Any) -> dict[str, Any]:
    """A method's settings as plain values, without what the layer table says."""
    row = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _NOT_SAVED or field.name in config.not_saved:
            continue
        # Readers of before know no such setting, and at its default they need not.
        if field.name in config.later and value == field.default:
            continue
        if isinstance(value, (set, frozenset, tuple)):
            value = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
        row[field.name] = value
    return row


def config_from(component: Component, place: str) -> Any:
    """The PEFT config of a component of a file, with the literal layer names as its targets.

    Args:
        place: File and header field of the component, for messages.

    Raises:
        SnellaConfigError: The method or one of its settings is unknown, mistyped or out of range.
    """
    from snell_diffusion.tuners import METHODS

    method = METHODS.get(component.method.upper())
    if method is None:
        known = shown(name.lower() for name in METHODS)
        raise SnellaConfigError(
            f"{place}.method': expected one of {known}, got "
            f"{quoted(component.method)}; upgrade snell_diffusion"
        )
    known_fields = {field.name for field in dataclasses.fields(method.config)}
    known_fields -= _NOT_SAVED | set(method.config.not_saved)
    unknown = set(component.config) - known_fields
    if unknown:
        raise SnellaConfigError(
            f"{place}.config': expected settings of method {component.method!r}, got "
            f"{shown(map(quoted, unknown))} (known: {shown(known_fields, 40)}); upgrade "
            "snell_diffusion, or have the file saved without them"
        )
    shapes = {path: row.tensors or {} for path, row in component.layers.items()}
    try:
        return method.config.stored(component.config, shapes)
    except (TypeError, ValueError) as error:
        raise SnellaConfigError(
            f"{place}.config': {error}; the file is damaged or was not written by "
            f"snell_diffusion: {FETCH}"
        ) from error
