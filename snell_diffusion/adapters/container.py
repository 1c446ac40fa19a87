"""The safetensors container: read whole into memory, checked piece by piece, written atomically.

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
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from snell_diffusion.adapters.limits import MAX_FILE_BYTES, MAX_HEADER_BYTES, MAX_TENSORS
from snell_diffusion.errors import SnellaFileError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


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
    try:
        # O_NONBLOCK: a named pipe must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SnellaFileError(
            f"{path}: cannot be opened ({error.strerror}); check the path and its permissions"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise SnellaFileError(f"{path}: expected a regular file, found a folder, pipe or device")
    if status.st_size > MAX_FILE_BYTES:
        os.close(descriptor)
        raise SnellaFileError(
            f"{path}: {status.st_size} bytes, adapters have at most {MAX_FILE_BYTES}; "
            "this is probably a whole model, not an adapter"
        )
    return os.fdopen(descriptor, "rb"), status.st_size


def read_head(stream: BinaryIO, size: int, source: str) -> Head:
    """Read and check the header of a container of `size` bytes; the stream is left at the body.

    Raises:
        SnellaFileError: Any structural fault; the message names the file and the fault.
    """
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise SnellaFileError(
            f"{source}: {size} bytes are too few for a safetensors file; fetch the file again"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise SnellaFileError(
            f"{source}: header of {length} bytes, expected at most {MAX_HEADER_BYTES}; "
            "this is no adapter file (or not safetensors at all)"
        )
    if 8 + length > size:
        raise SnellaFileError(
            f"{source}: header of {length} bytes in a file of {size} bytes: "
            "the file was cut off; fetch it again"
        )
    table = _parse_json(stream.read(length), source)
    metadata = _metadata(table.pop("__metadata__", {}), source)
    if len(table) > MAX_TENSORS:
        raise SnellaFileError(f"{source}: {len(table)} tensors, expected at most {MAX_TENSORS}")
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
            raise SnellaFileError(f"{source}: the file became shorter while it was read; try again")
        dtype = DTYPES[entry.dtype]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry.shape)
    return tensors


def _parse_json(raw: bytes, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not allowed")

    try:
        table = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant
        )
    except (ValueError, RecursionError) as error:
        raise SnellaFileError(
            f"{source}: the header is not valid JSON ({error}); fetch the file again"
        ) from error
    if not isinstance(table, dict):
        raise SnellaFileError(f"{source}: the header is a JSON {type(table).__name__}, not a table")
    return table


def parse_strict_json(text: str, source: str) -> dict[str, Any]:
    """A JSON table from text; refuses repeated keys, NaN, infinities and anything but a table.

    Raises:
        SnellaFileError: The text is something else.
    """
    return _parse_json(text.encode("utf-8", "surrogatepass"), source)


def _metadata(value: Any, source: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SnellaFileError(f"{source}: __metadata__ must be a table of texts")
    return cast(dict[str, str], value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_FILE_BYTES


def _entry(name: str, value: Any, source: str) -> Entry:
    place = f"{source}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise SnellaFileError(f"{place}: expected the fields dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SnellaFileError(f"{place}: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)):
        raise SnellaFileError(f"{place}: shape {shape!r}, expected up to 8 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise SnellaFileError(f"{place}: data_offsets {offsets!r}, expected [begin, end]")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise SnellaFileError(
            f"{place}: {dtype} of shape {shape} takes {expected} bytes, "
            f"its offsets {offsets} span {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _check_layout(entries: Mapping[str, Entry], body: int, source: str) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps the one before it" if entry.begin < position else "leaves a gap"
            raise SnellaFileError(f"{source}: tensor {name!r} {fault} at byte {entry.begin}")
        position = entry.end
    if position > body:
        raise SnellaFileError(
            f"{source}: {body} of {position} tensor bytes are there: "
            "the download stopped half-way; fetch the file again"
        )
    if position < body:
        raise SnellaFileError(
            f"{source}: {body - position} bytes too many after the last tensor; "
            "fetch the file again"
        )


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
                f"tensor {name!r} is {tensor.dtype}; adapters hold {', '.join(DTYPES)}"
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
    if len(text) > MAX_HEADER_BYTES or len(order) > MAX_TENSORS:
        raise SnellaFileError(
            f"{len(order)} tensors with a header of {len(text)} bytes; "
            f"adapters have at most {MAX_TENSORS} and {MAX_HEADER_BYTES}"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *body])


def write_atomic(path: Path, data: bytes) -> None:
    """Put a file in place in one step: a reader, or a crash, sees the old one or the new one whole.

    Raises:
        SnellaFileError: The folder or disk does not take the file; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise SnellaFileError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise SnellaFileError(
            f"{path}: {len(data)} bytes could not be written ({error.strerror}); "
            "check the free space"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
