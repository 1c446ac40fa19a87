"""Files, bytes and state dicts to a validated `AdapterFile`; nothing of a model is touched here."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from snell_diffusion.adapters.agreement import (
    check_dtypes,
    check_finite,
    check_table,
    check_values,
)
from snell_diffusion.adapters.bare import bare_header
from snell_diffusion.adapters.container import (
    DTYPES,
    FETCH,
    Head,
    open_regular,
    parse_strict_json,
    read_head,
    read_tensors,
)
from snell_diffusion.adapters.limits import MAX_FIELDS, MAX_TENSORS
from snell_diffusion.adapters.packing import blob_names, unpack
from snell_diffusion.adapters.schema import (
    DIGEST_KEY,
    HEADER_KEY,
    Header,
    digest,
    header_from,
    parse_header,
)
from snell_diffusion.adapters.tokens import TENSOR
from snell_diffusion.adapters.version0 import is_version0, migrated
from snell_diffusion.errors import SnellaFileError, printable, quoted

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
    check_dtypes(header, head, source)
    check_table(header, {name: entry.shape for name, entry in head.entries.items()}, source)
    tensors = read_tensors(stream, head, source)
    expected = head.metadata[DIGEST_KEY]
    came = digest(head.metadata[HEADER_KEY], tensors)
    if came != expected:
        raise SnellaFileError(
            f"{source}: field {DIGEST_KEY!r}: expected {quoted(expected[:23])}..., the content has "
            f"{came[:23]}...: header or tensors were changed after they were written; {FETCH}"
        )
    check_finite(tensors, source)
    tensors = _unpacked(header, migrated(tensors, source), source)
    check_values(header, tensors, source)
    return AdapterFile(header, tensors, source, came)


def _unpacked(header: Header, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Every layer's own tensors, out of the packed ones where a component has such."""
    packed = {name: part for name, part in header.components.items() if part.bits is not None}
    unpacked: dict[str, Tensor] = {}
    for component, part in packed.items():
        unpacked |= unpack(component, part, tensors, source)
    # Of finite numbers, levels times their spread can still be infinite.
    check_finite(unpacked, source)
    blobs = {name for component, part in packed.items() for name in blob_names(component, part)}
    return {name: value for name, value in tensors.items() if name not in blobs} | unpacked


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
    check_finite(copies, source)
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
    check_table(header, {name: tuple(t.shape) for name, t in copies.items()}, source)
    check_values(header, copies, source)
    return AdapterFile(header, copies, source, None)
