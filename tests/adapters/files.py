"""Builds adapter files by hand, so that each test can break one thing."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.adapters.container import encode
from snell_diffusion.adapters.doubles import split_doubles
from snell_diffusion.adapters.schema import DIGEST_KEY, FORMAT_KEY, HEADER_KEY, digest


def container(table: Mapping[str, Any] | str, body: bytes = b"") -> bytes:
    """A container from a header table (or its raw text) and a body, with no check at all."""
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    return len(text).to_bytes(8, "little") + text + body


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header table and body of a container."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def tensors_of(data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(data)


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(split(data)[0]["__metadata__"][HEADER_KEY])


def assemble(
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    version: str = "1.0",
    digest_text: str | None = None,
) -> bytes:
    """A file with a right digest (or the one given) over any header and tensors."""
    text = json.dumps(header)
    texts = {
        FORMAT_KEY: version,
        HEADER_KEY: text,
        DIGEST_KEY: digest_text or digest(text, tensors),
    }
    return encode(tensors, texts)


def rebuilt(
    data: bytes,
    header: Callable[[dict[str, Any]], Any] = lambda header: None,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    version: str = "1.0",
) -> bytes:
    """The file with its header and tensors changed in place by two functions, digest made right."""
    new_header, new_tensors = header_of(data), tensors_of(data)
    header(new_header)
    tensors(new_tensors)
    return assemble(new_header, new_tensors, version)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def level(value: float) -> Tensor:
    """A sparsity level as files hold it."""
    return split_doubles(torch.tensor(value, dtype=torch.float64), "level")
