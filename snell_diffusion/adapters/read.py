"""Files, bytes and state dicts to a validated `AdapterFile`; nothing of a model is touched here."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from snell_diffusion.adapters.bare import bare_header, method_settings
from snell_diffusion.adapters.container import (
    DTYPES,
    Head,
    open_regular,
    parse_strict_json,
    read_head,
    read_tensors,
)
from snell_diffusion.adapters.limits import MAX_TENSORS
from snell_diffusion.adapters.schema import (
    DIGEST_KEY,
    HEADER_KEY,
    Component,
    Header,
    Layer,
    digest,
    header_from,
    parse_header,
)
from snell_diffusion.errors import (
    SnellaFileError,
    SnellaKeyError,
    SnellaSchemaError,
    SnellaShapeError,
    SnellaValueError,
    shown,
)

__all__ = ["AdapterFile", "read_adapter", "read_header"]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that has passed every check that needs no model.

    Attributes:
        header: What the file says about itself.
        tensors: By full name (`state`), on the CPU, in the file's dtypes; all finite.
        source: File, hub id or "state dict", for messages.
        digest: "sha256:..." of header and tensors, None for a state dict.
    """

    header: Header
    tensors: dict[str, Tensor]
    source: str
    digest: str | None

    @cached_property
    def by_layer(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by `<component>.<module path>`, then by their short names."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            place, _, short = name.rpartition(".")
            groups.setdefault(place, {})[short] = tensor
        return groups


def read_adapter(
    source: str | os.PathLike[str] | bytes | Mapping[str, Any], name: str | None = None
) -> AdapterFile:
    """Read and check an adapter.

    Args:
        source: A safetensors file, its bytes, or a state dict: tensors by full name, with the
            header's JSON under `snella.header` or, bare, without it.
        name: What messages call the source; default its path.

    Raises:
        SnellaFileError: Not safetensors, damaged, too large, another format, changed content.
        SnellaSchemaError: A header field that does not fit.
        SnellaKeyError: Tensors without a layer, or layers without tensors.
        SnellaShapeError: Factors that do not fit the layer table.
        SnellaValueError: NaN or infinite values, or numbers that contradict the layer table.
    """
    if isinstance(source, Mapping):
        return _from_state_dict(source, name or "state dict")
    if isinstance(source, bytes):
        return _from_stream(io.BytesIO(source), len(source), name or "bytes")
    path = Path(source)
    stream, size = open_regular(path)
    with stream:
        return _from_stream(stream, size, name or str(path))


def read_header(path: str | os.PathLike[str]) -> tuple[Header, Head]:
    """The checked header and tensor table of a file, without reading its body.

    Raises:
        SnellaFileError, SnellaSchemaError: As `read_adapter`.
    """
    stream, size = open_regular(Path(path))
    with stream:
        head = read_head(stream, size, str(path))
    return parse_header(head.metadata, str(path)), head


def _from_stream(stream: BinaryIO, size: int, source: str) -> AdapterFile:
    head = read_head(stream, size, source)
    header = parse_header(head.metadata, source)
    _check_tensor_names(header, head.entries, source)
    tensors = read_tensors(stream, head, source)
    expected = head.metadata[DIGEST_KEY]
    came = digest(head.metadata[HEADER_KEY], tensors)
    if came != expected:
        raise SnellaFileError(
            f"{source}: the content was changed after it was written "
            f"(digest {came[:23]}..., the header says {expected[:23]!r}...); fetch the file again"
        )
    _check_values(header, tensors, source)
    return AdapterFile(header, tensors, source, came)


def _from_state_dict(state: Mapping[str, Any], source: str) -> AdapterFile:
    text = state.get(HEADER_KEY)
    tensors = {name: value for name, value in state.items() if name != HEADER_KEY}
    if len(tensors) > MAX_TENSORS:
        raise SnellaFileError(f"{source}: {len(tensors)} tensors, expected at most {MAX_TENSORS}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise SnellaFileError(
                f"{source}: {str(name)[:80]!r} is a {type(tensor).__name__}, expected a tensor"
            )
        if tensor.dtype not in DTYPES.values() or tensor.device.type == "meta":
            raise SnellaFileError(
                f"{source}: tensor {name!r} is {tensor.dtype} on {tensor.device}; expected "
                f"{', '.join(DTYPES)} with data"
            )
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    if text is None:
        data = bare_header(copies, source)
    elif isinstance(text, str):
        data = parse_strict_json(text, f"{source}: {HEADER_KEY}")
    else:
        raise SnellaFileError(f"{source}: {HEADER_KEY} is a {type(text).__name__}, expected text")
    header = header_from(data, source)
    _check_tensor_names(header, copies, source)
    _check_values(header, copies, source)
    return AdapterFile(header, copies, source, None)


def _check_tensor_names(header: Header, names: Mapping[str, Any], source: str) -> None:
    """A file may only hold tensors that its own layer table generates, and each layer some."""
    methods = {f"{name}.{part.method}_method" for name, part in header.components.items()}
    prefixes = {
        f"{name}.{path}": f"{part.method}_"
        for name, part in header.components.items()
        for path in part.layers
    }
    seen = set()
    strangers = []
    for name in names:
        stem, _, short = name.rpartition(".")
        if stem in prefixes and short.startswith(prefixes[stem]):
            seen.add(stem)
        elif name not in methods:
            strangers.append(name)
    if strangers:
        raise SnellaKeyError(
            f"{source}: tensors that belong to no layer of the table: {shown(strangers)}; "
            "an adapter cannot set anything else"
        )
    empty = (set(prefixes) - seen) | (methods - set(names))
    if empty:
        raise SnellaKeyError(f"{source}: no tensors for {shown(empty)}; the file is incomplete")


def _check_values(header: Header, tensors: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise SnellaValueError(
                f"{source}: tensor {name!r} holds {bad} NaN or infinite values of "
                f"{tensor.numel()}; use another checkpoint of this adapter"
            )
    for component, part in header.components.items():
        _check_method(component, part, tensors[f"{component}.{part.method}_method"], source)
        for path, layer in part.layers.items():
            if [part.config.get("r"), part.config.get("heads")] != [layer.r, layer.heads]:
                raise SnellaSchemaError(
                    f"{source}: layer {component}.{path} has r={layer.r}, heads={layer.heads}; the "
                    f"config says r={part.config.get('r')}, heads={part.config.get('heads')}"
                )
            _check_layer(f"{component}.{path}.{part.method}", layer, tensors, source)


def _check_method(component: str, part: Component, tensor: Tensor, source: str) -> None:
    for name, value in method_settings(part.method, tensor, f"{source}: {component}").items():
        if part.config.get(name) != value:
            raise SnellaSchemaError(
                f"{source}: component {component!r}: setting {name} is {part.config.get(name)!r} "
                f"in the header, {value!r} in its tensor; the file was put together wrongly"
            )


def _check_layer(stem: str, layer: Layer, tensors: Mapping[str, Tensor], source: str) -> None:
    out_features, in_features = layer.shape
    columns = layer.r // layer.heads
    expected = {
        f"{stem}_A": (layer.heads, in_features, columns),
        f"{stem}_B": (layer.heads, out_features, columns),
    }
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise SnellaShapeError(
                f"{source}: tensor {name!r} has shape {tuple(tensors[name].shape)}, the layer "
                f"table says {shape} ([heads, features, columns])"
            )
    for short, stated in (("sparsity", layer.sparsity), ("threshold", layer.threshold)):
        stored = tensors.get(f"{stem}_{short}")
        came = None if stored is None or stored.numel() != 1 else float(stored)
        if came != stated:
            raise SnellaValueError(
                f"{source}: {stem}_{short} is {came}, the layer table says {stated}; "
                "the file was put together wrongly"
            )
