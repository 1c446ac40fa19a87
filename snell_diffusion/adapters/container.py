"""The safetensors container: read whole into memory, checked piece by piece, encoded.

    8 bytes   N, length of the header, little endian
    N bytes   JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest  tensor bytes, without gaps or overlaps

The header is read and judged before one byte of the body, and nothing is ever memory-mapped,
unpickled or imported by name. Reading here instead of through the safetensors library gives each
kind of damage its own message and keeps the limits of `limits.py`; writing here makes the bytes of
a file a function of its content alone. Layout: https://github.com/huggingface/safetensors
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from snell_diffusion.adapters.limits import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADER_VALUES,
    MAX_TENSORS,
)
from snell_diffusion.adapters.signatures import looks_like
from snell_diffusion.adapters.version0 import is_version0
from snell_diffusion.errors import SnellaFileError, printable, quoted

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # Since format 1.2: factors of few bits, and positions of single weights.
    "U8": torch.uint8,
    "I64": torch.int64,
}
POSITIONS = ("positions",)
"""Last words of the names of tensors that hold positions."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_READ = {**DTYPES, "F64": torch.float64}  # of version 0, for the tensors of `is_version0` alone

FETCH = "download or copy the file again"


_NOT_OURS = (
    "this is no SNELLA adapter, or it is damaged: choose another file, or download this one again"
)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype code, shape, and [begin, end) in bytes from the body's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Head:
    """The judged header of a container: free metadata, tensor table, and body size in bytes."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    body_bytes: int


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for reading; returns it with its size in bytes.

    Raises:
        SnellaFileError: Missing, a folder, a device or pipe, unreadable, or over the size limit.
    """
    name = printable(str(path))
    try:
        # O_NONBLOCK: a named pipe must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a name no file can have
        reason = getattr(error, "strerror", None) or error
        raise SnellaFileError(
            f"{name}: cannot be opened ({reason}); check the path and its permissions"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise SnellaFileError(
            f"{name}: expected a regular file, found a {_kind(status.st_mode)}; name the "
            ".safetensors file itself"
        )
    if status.st_size > MAX_FILE_BYTES:
        os.close(descriptor)
        raise SnellaFileError(
            f"{name}: expected a file of at most {MAX_FILE_BYTES:,} bytes, got "
            f"{status.st_size:,}; this is probably a whole model: choose an adapter file"
        )
    return os.fdopen(descriptor, "rb"), status.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def read_head(stream: BinaryIO, size: int, source: str) -> Head:
    """Read and check the header of a container of `size` bytes; the stream is left at the body.

    Raises:
        SnellaFileError: Any structural fault; the message names the file and the fault.
    """
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise SnellaFileError(
            f"{source}: expected a safetensors file, which starts with the 8 bytes of its header's "
            f"length; the file has {size} bytes: {FETCH}"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise SnellaFileError(
            f"{source}: expected a safetensors header of at most {MAX_HEADER_BYTES:,} bytes, the "
            f"first 8 bytes announce {length:,}; {_seems(prefix + stream.read(24))}"
        )
    if 8 + length > size:
        raise SnellaFileError(
            f"{source}: the header should have {length:,} bytes, but the whole file has only "
            f"{size:,}: it was cut off; {FETCH}"
        )
    table = _parse_json(stream.read(length), source, MAX_HEADER_VALUES)
    metadata = _metadata(table.pop("__metadata__", {}), source)
    if len(table) > MAX_TENSORS:
        raise SnellaFileError(
            f"{source}: expected at most {MAX_TENSORS:,} tensors, the header lists {len(table):,}; "
            f"{_NOT_OURS}"
        )
    entries = {name: _entry(name, value, source) for name, value in table.items()}
    body = size - 8 - length
    _check_layout(entries, body, source)
    return Head(metadata, entries, body)


def read_tensors(stream: BinaryIO, head: Head, source: str) -> dict[str, Tensor]:
    """Read the body that follows `read_head` into memory of our own.

    Raises:
        SnellaFileError: The file became shorter while it was read.
    """
    tensors = {}
    for name, entry in sorted(head.entries.items(), key=lambda item: item[1].begin):
        raw = bytearray(entry.end - entry.begin)
        if stream.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise SnellaFileError(
                f"{source}: the file became shorter while tensor {quoted(name)} was read; another "
                "program is writing it: wait for it to end and try again"
            )
        dtype = _READ[entry.dtype]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry.shape)
    return tensors


def _fault(error: Exception) -> str:
    """What is wrong with JSON, in words that do not change with Python's version."""
    if isinstance(error, json.JSONDecodeError):
        return f"something else at character {error.pos}"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not UTF-8 at byte {error.start}"
    if isinstance(error, RecursionError):
        return "values nested too deeply"
    return str(error) if isinstance(error, _Refused) else "a number of thousands of digits"


class _Refused(ValueError):
    """JSON that is legal and not allowed here."""


def _seems(start: bytes) -> str:
    what = looks_like(start)
    return f"it looks like {what}: choose a SNELLA adapter" if what else _NOT_OURS


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _Refused(f"key {quoted(key, 200)} occurs twice")
        table[key] = value
    return table


def _no_constant(name: str) -> float:
    raise _Refused(f"{name} is not allowed")


def _parse_json(raw: bytes, source: str, values: int) -> dict[str, Any]:
    # A few bytes of text can become a hundred of objects, so the text is judged first.
    if raw.count(b",") >= values:
        raise SnellaFileError(
            f"{source}: expected at most {values:,} values in the header, it has more; {_NOT_OURS}"
        )
    try:
        table = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise SnellaFileError(
            f"{source}: expected a header of valid JSON, got {_fault(error)}; {FETCH}"
        ) from error
    if not isinstance(table, dict):
        raise SnellaFileError(
            f"{source}: expected a JSON table as the header, got a {type(table).__name__} "
            f"({quoted(table)}); {_NOT_OURS}"
        )
    return table


def parse_strict_json(text: str, source: str, values: int = MAX_HEADER_VALUES) -> dict[str, Any]:
    """A JSON table from text; refuses repeated keys, NaN, infinities and anything but a table.

    Args:
        values: How many values the text may hold, over all levels.

    Raises:
        SnellaFileError: The text is something else.
    """
    return _parse_json(text.encode("utf-8", "surrogatepass"), source, values)


def _metadata(value: Any, source: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise SnellaFileError(
            f"{source}: field '__metadata__': expected a table of texts, got {quoted(value)}; "
            f"{_NOT_OURS}"
        )
    for name, item in value.items():
        if not isinstance(item, str):
            raise SnellaFileError(
                f"{source}: field '__metadata__', entry {quoted(name)}: expected a text, got "
                f"{quoted(item)}; {_NOT_OURS}"
            )
    return cast(dict[str, str], value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_FILE_BYTES


def _entry(name: str, value: Any, source: str) -> Entry:
    place = f"{source}: tensor {quoted(name, 200)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise SnellaFileError(
            f"{place}: expected the fields dtype, shape and data_offsets, got {quoted(value)}; "
            f"{_NOT_OURS}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)):
        raise SnellaFileError(
            f"{place}: field 'shape': expected a list of up to 8 sizes, got {quoted(shape)}; "
            f"{_NOT_OURS}"
        )
    known = isinstance(dtype, str) and dtype in DTYPES
    if not known and not (dtype == "F64" and is_version0(name, shape)):
        raise SnellaFileError(
            f"{place}: field 'dtype': expected one of {', '.join(DTYPES)}, got {quoted(dtype)}; "
            "adapters hold no other numbers: ask its author to save it with snell_diffusion"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise SnellaFileError(
            f"{place}: field 'data_offsets': expected [begin, end] in bytes, got {quoted(offsets)};"
            f" {_NOT_OURS}"
        )
    begin, end = offsets
    expected = math.prod(shape) * _READ[dtype].itemsize
    if end - begin != expected:
        raise SnellaFileError(
            f"{place}: field 'data_offsets': expected {expected:,} bytes for {dtype} of shape "
            f"{shape}, got {end - begin:,} ({offsets}); the header is damaged: {FETCH}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _check_layout(entries: Mapping[str, Entry], body: int, source: str) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps the one before it" if entry.begin < position else "leaves a gap"
            raise SnellaFileError(
                f"{source}: tensor {quoted(name, 200)} {fault}: expected to begin at byte "
                f"{position:,} of the body, begins at {entry.begin:,}; {_NOT_OURS}"
            )
        position = entry.end
    if position > body:
        raise SnellaFileError(
            f"{source}: expected {position:,} bytes of tensors, up to the end of {_last(entries)}, "
            f"got {body:,}: the download stopped half-way; {FETCH}"
        )
    if position < body:
        raise SnellaFileError(
            f"{source}: expected the file to end with {_last(entries)}, got "
            f"{body - position:,} more bytes; something was appended: {FETCH}"
        )


def _last(entries: Mapping[str, Entry]) -> str:
    name = max(entries, key=lambda name: entries[name].end, default=None)
    return "the header" if name is None else f"tensor {quoted(name, 200)}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values in row order, little endian, as in a file; no copy on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A container as bytes; equal content gives equal bytes.

    Raises:
        SnellaFileError: A dtype or a size that readers would refuse.
    """
    # Wide items first, as the library does, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    body: list[memoryview] = []
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise SnellaFileError(
                f"tensor {name!r}: expected one of {', '.join(DTYPES)}, got {tensor.dtype}; "
                "nothing was written: convert it first"
            )
        raw = tensor_bytes(tensor)
        table[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(raw)],
        }
        position += len(raw)
        body.append(raw)
    text = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    values = text.count(b",")  # as the reader counts them
    if len(text) > MAX_HEADER_BYTES or len(order) > MAX_TENSORS or values >= MAX_HEADER_VALUES:
        raise SnellaFileError(
            f"expected at most {MAX_TENSORS:,} tensors and a header of {MAX_HEADER_BYTES:,} bytes "
            f"and {MAX_HEADER_VALUES:,} values, got {len(order):,}, {len(text):,} and {values:,}; "
            "nothing was written: adapt fewer layers"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *body])
