"""Files, bytes and state dicts to a validated `AdapterFile`; nothing of a model is touched here."""

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from snell_diffusion.adapters.bare import bare_header, has_method_tensor, method_settings
from snell_diffusion.adapters.container import (
    DTYPES,
    FETCH,
    POSITIONS,
    Head,
    open_regular,
    parse_strict_json,
    read_head,
    read_tensors,
)
from snell_diffusion.adapters.doubles import join_doubles
from snell_diffusion.adapters.limits import MAX_FIELDS, MAX_SETTING, MAX_TENSORS
from snell_diffusion.adapters.packing import packed_names, packed_shapes, unpack
from snell_diffusion.adapters.rows import layer_shapes
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
from snell_diffusion.adapters.tokens import TENSOR
from snell_diffusion.adapters.version0 import is_version0, migrated
from snell_diffusion.errors import (
    SnellaFileError,
    SnellaKeyError,
    SnellaSchemaError,
    SnellaShapeError,
    SnellaValueError,
    printable,
    quoted,
    shown,
)

CHUNK = 2**20  # values looked at together: a check must not need as much memory as a tensor
AGAIN = "the file was changed after it was written: get it again from its author"

__all__ = ["AdapterFile", "read_adapter", "read_header"]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that has passed every check that needs no model.

    Attributes:
        header: What the file says about itself.
        tensors: By full name (`state`), on the CPU, as a file of format 1.0 holds them (levels in
            three parts, see `doubles`); all finite.
        source: File, hub id or "state dict", for messages.
        digest: "sha256:..." of the header and the tensors in the file, None for a state dict.
    """

    header: Header
    tensors: dict[str, Tensor]
    source: str
    digest: str | None

    def without_tokens(self) -> "AdapterFile":
        """The updates alone, for places that have no tokenizer."""
        if self.header.tokens is None:
            return self
        header = self.header.model_copy(
            update={"tokens": None, "requires": sorted(set(self.header.requires) - {"tokens"})}
        )
        names = {f"{name}.{TENSOR}" for name in self.header.tokens.encoders}
        tensors = {name: value for name, value in self.tensors.items() if name not in names}
        return replace(self, header=header, tensors=tensors)

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
        return _from_stream(stream, size, name or printable(str(path)))


def read_header(path: str | os.PathLike[str]) -> tuple[Header, Head]:
    """The checked header and tensor table of a file, without reading its body.

    Raises:
        SnellaFileError, SnellaSchemaError: As `read_adapter`.
    """
    source = printable(str(path))
    stream, size = open_regular(Path(path))
    with stream:
        head = read_head(stream, size, source)
    return parse_header(head.metadata, source), head


def _from_stream(stream: BinaryIO, size: int, source: str) -> AdapterFile:
    head = read_head(stream, size, source)
    header = parse_header(head.metadata, source)
    # Before the body is read: so it holds what the table accounts for and nothing more.
    _check_packed(header, head, source)
    _check_table(header, {name: entry.shape for name, entry in head.entries.items()}, source)
    tensors = read_tensors(stream, head, source)
    expected = head.metadata[DIGEST_KEY]
    came = digest(head.metadata[HEADER_KEY], tensors)
    if came != expected:
        raise SnellaFileError(
            f"{source}: field {DIGEST_KEY!r}: expected {quoted(expected[:23])}..., the content has "
            f"{came[:23]}...: header or tensors were changed after they were written; {FETCH}"
        )
    _check_finite(tensors, source)
    tensors = migrated(tensors, source)
    for component, part in header.components.items():
        if part.bits is not None:
            unpacked = unpack(component, part, tensors, source)
            blobs = packed_shapes(component, part, "")
            tensors = {n: t for n, t in tensors.items() if n not in blobs} | unpacked
    _check_finite(tensors, source)
    _check_values(header, tensors, source)
    return AdapterFile(header, tensors, source, came)


def _from_state_dict(state: Mapping[str, Any], source: str) -> AdapterFile:
    text = state.get(HEADER_KEY)
    tensors = {name: value for name, value in state.items() if name != HEADER_KEY}
    if len(tensors) > MAX_TENSORS:
        raise SnellaFileError(
            f"{source}: expected at most {MAX_TENSORS:,} tensors, got {len(tensors):,}; this is no "
            "SNELLA adapter"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise SnellaFileError(
                f"{source}: entry {quoted(name)}: expected a tensor under a name, got a "
                f"{type(tensor).__name__}; pass a dict as of snella_state_dict"
            )
        known = tensor.dtype in DTYPES.values() or (
            tensor.dtype == torch.float64 and is_version0(name, tensor.shape)
        )
        if not known or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise SnellaFileError(
                f"{source}: tensor {quoted(name, 200)}: expected dense {', '.join(DTYPES)} with "
                f"data, got {tensor.dtype}, {tensor.layout}, on {tensor.device}; convert it first"
            )
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    _check_finite(copies, source)
    copies = migrated(copies, source)
    if text is None:
        data = bare_header(copies, source)
    elif isinstance(text, str):
        data = parse_strict_json(text, f"{source}: field {HEADER_KEY!r}", MAX_FIELDS)
    else:
        raise SnellaFileError(
            f"{source}: field {HEADER_KEY!r}: expected a text, got a {type(text).__name__}; pass a "
            "dict as of snella_state_dict"
        )
    header = header_from(data, source)
    plain = {n: p.model_copy(update={"bits": None}) for n, p in header.components.items()}
    header = header.model_copy(update={"components": plain})
    _check_table(header, {name: tuple(t.shape) for name, t in copies.items()}, source)
    _check_values(header, copies, source)
    return AdapterFile(header, copies, source, None)


def _check_packed(header: Header, head: Head, source: str) -> None:
    """Whole numbers are what packed factors are made of, and nothing else is."""
    for component, part in header.components.items():
        if part.bits is not None and not packed_names(part):
            raise SnellaSchemaError(
                f"{source}: header field 'components.{component}.bits': expected none of method "
                f"{part.method!r}, whose tensors are not packed, got {part.bits}; {AGAIN}"
            )
    whole = {
        f"{name}.{part.method}_codes"
        for name, part in header.components.items()
        if part.bits is not None
    }
    positions = {f"_{kind}" for kind in POSITIONS}
    for name, entry in head.entries.items():
        expected = "U8" if name in whole else None
        if expected is None and any(name.endswith(kind) for kind in positions):
            expected = "I64"
        if (entry.dtype == "U8") != (expected == "U8") or (entry.dtype == "I64") != (
            expected == "I64"
        ):
            raise SnellaFileError(
                f"{source}: tensor {quoted(name, 200)}: expected {expected or 'floats'}, got "
                f"{entry.dtype}; {AGAIN}"
            )


def _check_table(header: Header, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """A file may only hold tensors that its own layer table generates, and each layer some."""
    blobs: dict[str, tuple[int, ...]] = {}
    for component, part in header.components.items():
        if part.bits is not None:
            place = f"{source}: header field 'components.{component}"
            blobs |= packed_shapes(component, part, place)
    for name, expected in blobs.items():
        if shapes.get(name) != expected:
            came = "nothing" if name not in shapes else list(shapes[name])
            raise SnellaShapeError(
                f"{source}: tensor '{name}': expected shape {list(expected)} by the layer table, "
                f"got {came}; {AGAIN}"
            )
    rest = {name: shape for name, shape in shapes.items() if name not in blobs}
    _check_tensor_names(header, rest, source)
    _check_shapes(header, rest, source)


def _check_tensor_names(header: Header, names: Mapping[str, Any], source: str) -> None:
    methods = {
        f"{name}.{part.method}_method"
        for name, part in header.components.items()
        if has_method_tensor(part.method)
    }
    methods |= _word_shapes(header).keys()
    prefixes = {
        f"{name}.{path}": f"{part.method}_"
        for name, part in header.components.items()
        if part.bits is None
        for path, row in part.layers.items()
        if row.tensors != {}
    }
    seen = set()
    strangers = []
    for name in names:
        stem, _, short = name.rpartition(".")
        # Printable: a lone surrogate, which JSON can spell, has no bytes for the digest.
        if stem in prefixes and short.startswith(prefixes[stem]) and short.isprintable():
            seen.add(stem)
        elif name not in methods:
            strangers.append(name)
    if strangers:
        raise SnellaKeyError(
            f"{source}: expected only tensors of the layers in its table, got "
            f"{shown(map(_name, strangers))}, and an adapter can set nothing else; {AGAIN}"
        )
    empty = (set(prefixes) - seen) | (methods - set(names))
    if empty:
        raise SnellaKeyError(
            f"{source}: expected tensors for every layer in its table, got none for "
            f"{shown(empty)}; the file is incomplete: get it again from its author"
        )


def _word_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The tensors of new words by name, and their shapes."""
    if header.tokens is None:
        return {}
    rows, count = header.tokens.encoders, header.tokens.vectors
    return {f"{name}.{TENSOR}": (count, row.size) for name, row in rows.items()}


def _name(tensor_name: str) -> str:
    return quoted(tensor_name, 200)[1:-1]


def _check_shapes(header: Header, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Factors have the layer's sizes; everything else is a handful of numbers."""
    for component, part in header.components.items():
        if part.bits is not None:
            continue
        for path, layer in part.layers.items():
            stem = f"{component}.{path}"
            if layer.tensors is not None:
                _check_listed(stem, part.method, layer, shapes, source)
                continue
            wanted = layer_shapes(layer, part.config.get("kernel"))
            for short in ("snella_A", "snella_B"):
                expected = wanted[short]
                came = shapes.get(f"{stem}.{short}", expected)
                if came != expected:
                    raise SnellaShapeError(
                        f"{source}: tensor '{stem}.{short}': expected shape {list(expected)} "
                        "([heads, features, columns]) by the layer table, got "
                        f"{list(came)}; {AGAIN}"
                    )
    words = _word_shapes(header)
    for name, size in words.items():
        if shapes[name] != size:
            raise SnellaShapeError(
                f"{source}: tensor '{name}': expected shape {list(size)} ([embeddings, size]) by "
                f"the header's words, got {list(shapes[name])}; {AGAIN}"
            )
    listed = {
        f"{component}.{path}"
        for component, part in header.components.items()
        for path, layer in part.layers.items()
        if layer.tensors is not None
    }
    for name, shape in shapes.items():
        if name in words or name.rpartition(".")[0] in listed:
            continue
        if not name.endswith(("_A", "_B")) and math.prod(shape) > MAX_SETTING:
            raise SnellaShapeError(
                f"{source}: tensor {_name(name)!r}: expected a setting of at most {MAX_SETTING} "
                f"numbers, got shape {list(shape)}; {AGAIN}"
            )


def _check_listed(
    stem: str, method: str, layer: Layer, shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """The tensors of a layer are exactly those that its row lists."""
    assert layer.tensors is not None
    head = f"{stem}.{method}_"
    came = {name[len(stem) + 1 :]: shape for name, shape in shapes.items() if _of(name, head)}
    wanted = {name: tuple(shape) for name, shape in layer.tensors.items()}
    if came != wanted:
        names = came.keys() | wanted.keys()
        odd = sorted(name for name in names if came.get(name) != wanted.get(name))
        raise SnellaShapeError(
            f"{source}: tensor {_name(f'{stem}.{odd[0]}')!r}: expected "
            f"{wanted.get(odd[0], 'none of that name')} by the layer table, got "
            f"{came.get(odd[0], 'nothing')}; {AGAIN}"
        )


def _of(name: str, head: str) -> bool:
    return name.startswith(head) and "." not in name[len(head) :]


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        bad = _count_not_finite(tensor)
        if bad:
            raise SnellaValueError(
                f"{source}: tensor {quoted(name, 200)}: expected finite numbers, got {bad:,} "
                f"NaN or infinite ones of {tensor.numel():,}; use another checkpoint of this "
                "adapter"
            )


def _check_values(header: Header, tensors: Mapping[str, Tensor], source: str) -> None:
    """What tensors and header both tell must agree."""
    for component, part in header.components.items():
        if not has_method_tensor(part.method):
            continue
        _check_method(component, part, tensors[f"{component}.{part.method}_method"], source)
        for path, layer in part.layers.items():
            for name, value in (("r", layer.r), ("heads", layer.heads)):
                if part.config.get(name) != value:
                    raise SnellaSchemaError(
                        f"{source}: header field 'components.{component}.config.{name}': expected "
                        f"{value} as in layer {path!r}, got "
                        f"{quoted(part.config.get(name))}; {AGAIN}"
                    )
            if layer.sparsity and part.config.get("sparsify") == "none":
                raise SnellaSchemaError(
                    f"{source}: header field 'components.{component}.layers.{path}.sparsity': "
                    f"expected 0 with sparsify 'none', got {layer.sparsity}; {AGAIN}"
                )
            _check_level(f"{component}.{path}.{part.method}", layer, tensors, source)
            _check_kernel(f"{component}.{path}.{part.method}_kernel", layer, tensors, source)


def _count_not_finite(tensor: Tensor) -> int:
    return sum(int((~torch.isfinite(chunk)).sum()) for chunk in tensor.reshape(-1).split(CHUNK))


def _check_method(component: str, part: Component, tensor: Tensor, source: str) -> None:
    place = f"{source}: tensor '{component}.{part.method}_method'"
    for name, value in method_settings(part.method, tensor, place).items():
        if part.config.get(name) != value:
            raise SnellaSchemaError(
                f"{place}: setting {name}: expected {quoted(part.config.get(name))} as in the "
                f"header, got {value!r}; {AGAIN}"
            )


def _check_kernel(name: str, layer: Layer, tensors: Mapping[str, Tensor], source: str) -> None:
    expected = (
        None if layer.kernel is None else [*map(float, layer.kernel), float(layer.groups or 1)]
    )
    came = tensors[name].tolist() if name in tensors else None
    if came != expected:
        raise SnellaValueError(
            f"{source}: tensor '{name}': expected {expected} as in the layer table, got "
            f"{quoted(came)}; {AGAIN}"
        )


def _check_level(stem: str, layer: Layer, tensors: Mapping[str, Tensor], source: str) -> None:
    place = f"{source}: tensor '{stem}_"
    level, threshold = tensors.get(f"{stem}_sparsity"), tensors.get(f"{stem}_threshold")
    came = None if level is None else join_doubles(level, f"{place}sparsity'").tolist()
    if came != layer.sparsity:
        raise SnellaValueError(
            f"{place}sparsity': expected {layer.sparsity} as in the layer table, got "
            f"{quoted(came)}; {AGAIN}"
        )
    came = None if threshold is None else threshold.tolist()
    if came != layer.threshold:
        raise SnellaValueError(
            f"{place}threshold': expected {layer.threshold} as in the layer table, got "
            f"{quoted(came)}; {AGAIN}"
        )
