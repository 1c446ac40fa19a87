"""Adapters to files: one safetensors file per adapter, whatever components it covers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.atomic import write_atomic
from snell_diffusion.adapters.bare import has_method_tensor, method_tensor
from snell_diffusion.adapters.container import encode
from snell_diffusion.adapters.identity import config_hash
from snell_diffusion.adapters.packing import pack
from snell_diffusion.adapters.schema import (
    DIGEST_KEY,
    FORMAT_KEY,
    HEADER_KEY,
    WRITING,
    Header,
    digest,
    features_of,
    format_for,
    header_from,
)
from snell_diffusion.adapters.state import (
    Components,
    adapter_layers,
    adapter_state,
    bits_to_pack,
    config_row,
    layer_row,
    layer_tensors,
    method_name,
)
from snell_diffusion.adapters.tokens import describe_tokens
from snell_diffusion.errors import SnellaConfigError, SnellaSchemaError, SnellaValueError, shown

__all__ = [
    "adapter_file_bytes",
    "describe",
    "file_bytes",
    "save_adapter",
    "state_with_header",
    "target_file",
]

_STORAGE = (None, torch.float32, torch.float16, torch.bfloat16)


def save_adapter(
    path: str | os.PathLike[str],
    components: Components,
    adapter_name: str = "default",
    metadata: Mapping[str, Any] | None = None,
    base: Mapping[str, str | None] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one adapter of live models to a file, atomically.

    Args:
        path: A folder, which gets `pytorch_snella_weights.safetensors`, or a `.safetensors` file.
        components: Models by their name in the pipeline, e.g. {"unet": ..., "text_encoder": ...};
            those without the adapter are left out.
        adapter_name: Which adapter; its name is not written.
        metadata: Flat table of numbers and texts, e.g. instance_prompt, steps (up to 64 entries,
            texts up to 2,048 characters).
        base: Where the base model came from: any of pipeline, source, revision.
        dtype: Storage of the factor matrices: float32 (default), float16 or bfloat16.

    Returns:
        The file.

    Raises:
        SnellaKeyError: No layer has the adapter.
        SnellaConfigError: Two components of one adapter use the same method differently.
        SnellaSchemaError: Metadata beyond the limits.
        SnellaValueError: Tensors that are not finite, or another `dtype`.
        SnellaFileError: The disk does not take the file.
    """
    target = target_file(path)
    data = adapter_file_bytes(components, adapter_name, metadata, base, dtype)
    write_atomic(target, data)
    return target


def target_file(path: str | os.PathLike[str]) -> Path:
    """The file a path stands for: itself if it ends in .safetensors, else one inside the folder."""
    target = Path(path)
    return target if target.suffix == ".safetensors" else target / limits.WEIGHTS_NAME


def adapter_file_bytes(
    components: Components,
    adapter_name: str = "default",
    metadata: Mapping[str, Any] | None = None,
    base: Mapping[str, str | None] | None = None,
    dtype: torch.dtype | None = None,
) -> bytes:
    """The file of `save_adapter` as bytes; equal adapters give equal bytes."""
    header, tensors = describe(components, adapter_name, metadata, base, dtype)
    tensors = _packed(components, adapter_name, header, tensors)
    return file_bytes(header, tensors, f"adapter {adapter_name!r}")


def file_bytes(header: Header, tensors: Mapping[str, Tensor], name: str) -> bytes:
    """A file of a header and the tensors that it describes; `name` is for messages.

    Raises:
        SnellaSchemaError: A header beyond the limits.
    """
    text = header.to_json()
    if text.count(",") >= limits.MAX_FIELDS:  # as the reader counts them
        raise SnellaSchemaError(
            f"{name}: expected at most {limits.MAX_FIELDS:,} values in the "
            f"header, commas in texts included, got {text.count(','):,}; {WRITING}"
        )
    texts = {
        "format": "pt",
        FORMAT_KEY: header.format,
        HEADER_KEY: text,
        DIGEST_KEY: digest(text, tensors),
    }
    return encode(tensors, texts)


def _packed(
    components: Components, adapter_name: str, header: Header, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors as the file holds them: factors of few bits packed, from the latents."""
    parts = {name: part for name, part in header.components.items() if part.bits is not None}
    latents = {
        f"{component}.{path}.{short}": tensor.detach()
        for component, path, layer in adapter_layers(components, adapter_name)
        if component in parts
        for short, tensor in layer_tensors(layer, adapter_name).items()
        if short in type(layer).packed_names
    }
    for component, part in parts.items():
        packed = pack(component, part, tensors | latents)
        layers = {f"{component}.{path}" for path in part.layers}
        rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in layers}
        tensors = rest | packed
    return tensors


def state_with_header(
    components: Components,
    adapter_name: str = "default",
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Tensor | str]:
    """One adapter as a state dict that `read_adapter` takes, its header under `snella.header`."""
    header, tensors = describe(components, adapter_name, metadata)
    return {**tensors, HEADER_KEY: header.to_json()}


def describe(
    components: Components,
    adapter_name: str = "default",
    metadata: Mapping[str, Any] | None = None,
    base: Mapping[str, str | None] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of one adapter; see `save_adapter` for arguments and errors."""
    from snell_diffusion import __version__

    if dtype not in _STORAGE:
        raise SnellaValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    narrow = None if dtype is torch.float32 else dtype
    tensors = adapter_state(components, adapter_name, narrow)
    parts: dict[str, dict[str, Any]] = {}
    for component, path, layer in adapter_layers(components, adapter_name):
        config = layer.configs[adapter_name]
        if component not in parts:
            parts[component] = _component(components[component], config)
        elif config_row(config) != parts[component]["config"]:
            raise SnellaConfigError(
                f"adapter {adapter_name!r}: layer {component}.{path} has other settings than the "
                "layers before it; one adapter has one config per component"
            )
        row = layer_row(layer, adapter_name)
        if narrow is not None and "threshold" in row:
            row["threshold"] = None
        parts[component]["layers"][path] = row
    for component, part in parts.items():
        if has_method_tensor(part["method"]):
            tensors[f"{component}.{part['method']}_method"] = method_tensor(
                part["method"], part["config"], f"adapter {adapter_name!r}"
            )
    tokens, rows = describe_tokens(components, adapter_name)
    tensors |= rows
    kinds = {row["kind"] for part in parts.values() for row in part["layers"].values()}
    packed = any(part["bits"] is not None for part in parts.values())
    features = features_of({p["method"] for p in parts.values()}, kinds, bool(tokens), packed)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SnellaValueError(
                f"tensor {name!r} of adapter {adapter_name!r} holds NaN or infinite values; "
                "nothing was written: go back to an earlier checkpoint"
            )
    header = header_from(
        {
            "format": format_for(features),
            "writer": f"snell_diffusion {__version__}",
            "requires": sorted(features),
            "origin": {name: _origin(value) for name, value in (base or {}).items()},
            "components": parts,
            "metadata": dict(metadata or {}),
            "tokens": tokens,
        },
        f"adapter {adapter_name!r}",
        hint=WRITING,
    )
    return header, tensors


def _origin(value: str | None) -> str | None:
    """A text for people, within the limits; of a local folder only its own name is told."""
    if value is None:
        return None
    if os.path.exists(value):
        value = Path(value).resolve().name
    return value[: limits.MAX_STRING]


def _component(model: nn.Module, config: Any) -> dict[str, Any]:
    if config.modules_to_save:
        raise SnellaConfigError(
            f"this adapter also trains whole modules ({shown(config.modules_to_save)}), which "
            f"format {limits.FORMAT} does not hold: save those yourself, without modules_to_save"
        )
    return {
        "method": method_name(config),
        "config": config_row(config),
        "base": {"class": type(model).__name__, "config_hash": config_hash(model)},
        "bits": bits_to_pack(config),
        "layers": {},
    }
