"""Trained factors rounded to 1, 2, 4 or 8 bits per number: post-training quantization of a file.

An adapter trained with that many `bits` from the start loses nothing here; one trained in float32
loses what rounding costs: next to nothing with 4 bits (docs/small_files.md).
"""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from snell_diffusion.adapters.atomic import write_atomic
from snell_diffusion.adapters.packing import pack, packed_names, unpack
from snell_diffusion.adapters.read import AdapterFile, read_adapter
from snell_diffusion.adapters.schema import Component, Header, features_of, format_for
from snell_diffusion.adapters.write import file_bytes, target_file
from snell_diffusion.core.quantize import BITS
from snell_diffusion.errors import SnellaConfigError, SnellaValueError

__all__ = ["quantize_adapter", "rounded"]


def quantize_adapter(
    source: str | os.PathLike[str], target: str | os.PathLike[str], bits: int
) -> Path:
    """Write an adapter file again with its factors in a few bits.

    Args:
        source: An adapter file of this package, in float32 or 16 bits.
        target: A folder or a `.safetensors` file.
        bits: 1, 2, 4 or 8.

    Returns:
        The file.

    Raises:
        SnellaError: No adapter, one whose method has no factors to pack or that is packed already,
            or a disk that does not take the file. Nothing was written then.
    """
    file = read_adapter(source)
    path = target_file(target)
    header, tensors = quantized(file, bits)
    blobs = _outside(tensors, header)
    for component, part in header.components.items():
        blobs |= pack(component, part, tensors)
    write_atomic(path, file_bytes(header, blobs, file.source))
    return path


def quantized(file: AdapterFile, bits: int) -> tuple[Header, dict[str, Tensor]]:
    """Header and latent tensors of the packed form of an adapter; see `quantize_adapter`."""
    if bits not in BITS:
        raise SnellaConfigError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    parts: dict[str, Component] = {}
    for name, part in file.header.components.items():
        if not packed_names(part):
            raise SnellaValueError(
                f"{file.source}: method {part.method!r} of {name!r} has no factors that are stored "
                "in few bits; those of snella and binary_lora are"
            )
        if part.bits is not None or part.config.get("bits", 32) != 32:
            raise SnellaValueError(
                f"{file.source}: {name!r} has {part.config.get('bits', part.bits)} bits per number "
                "already: start from the file in float32"
            )
        layers = {p: row.model_copy(update={"threshold": None}) for p, row in part.layers.items()}
        settings = {**part.config, "bits": bits}
        parts[name] = part.model_copy(update={"bits": bits, "config": settings, "layers": layers})
    header = file.header
    kinds = {row.kind for part in parts.values() for row in part.layers.values()}
    methods = {part.method for part in parts.values()}
    features = features_of(methods, kinds, header.tokens is not None, packed=True)
    header = header.model_copy(
        update={
            "components": parts,
            "requires": sorted(features),
            "format": format_for(features),
        }
    )
    return header, dict(file.tensors)


def rounded(file: AdapterFile, bits: int) -> AdapterFile:
    """The adapter as it would come back from a packed file, without writing one.

    Raises:
        SnellaError: As `quantize_adapter`.
    """
    header, tensors = quantized(file, bits)
    values = _outside(tensors, header)
    for component, part in header.components.items():
        values |= unpack(component, part, pack(component, part, tensors), file.source)
    return AdapterFile(header, values, file.source, None)


def _outside(tensors: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """The tensors of no layer: settings and new words."""
    layers = {f"{c}.{path}" for c, part in header.components.items() for path in part.layers}
    return {n: tensor for n, tensor in tensors.items() if n.rpartition(".")[0] not in layers}
