"""Factors of 1, 2, 4 or 8 bits per number in a file: two tensors for all layers of a component.

    <component>.<method>_codes    U8   level indices of every packed matrix, each from a new byte on
    <component>.<method>_numbers  F32  mean and standard deviation of each of them, then every other
                                       tensor of its layer

Layers come in the order of the table, tensors by name. What is read is unpacked at once: the rest
of the package sees one layout. The levels are those of `snell_diffusion.core.quantize`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.rows import layer_shapes
from snell_diffusion.adapters.schema import Component
from snell_diffusion.core.quantize import decode, encode, packed_bytes
from snell_diffusion.errors import SnellaShapeError, SnellaValueError
from snell_diffusion.tuners import METHODS

__all__ = ["blob_names", "pack", "packed_names", "packed_shapes", "unpack"]

Shapes = dict[str, tuple[int, ...]]
_STATS = 2


class BlobNames(NamedTuple):
    """Full names of the two tensors that hold a packed component."""

    codes: str
    numbers: str


def blob_names(component: str, part: Component) -> BlobNames:
    """The tensors that a packed component has in place of its layers' own."""
    stem = f"{component}.{part.method}"
    return BlobNames(f"{stem}_codes", f"{stem}_numbers")


def pack(component: str, part: Component, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one component as they lie in a packed file.

    Args:
        component: Its name.
        part: Its settings and layers, `bits` set.
        tensors: Latent factors and everything else, by full name.
    """
    assert part.bits is not None
    codes: list[Tensor] = []
    numbers: list[Tensor] = []
    for path, shapes in _layers(part):
        stats, others = [], []
        for short in shapes:
            tensor = tensors[f"{component}.{path}.{short}"]
            if short in packed_names(part):
                matrix, stat = encode(tensor, part.bits)
                codes.append(matrix)
                stats.append(stat)
            else:
                others.append(tensor.float().reshape(-1))
        numbers += [*stats, *others]
    names = blob_names(component, part)
    return {names.codes: torch.cat(codes), names.numbers: torch.cat(numbers)}


def packed_shapes(component: str, part: Component, place: str) -> Shapes:
    """What `pack` gives for the table's layers: shapes by full name.

    Raises:
        SnellaShapeError: More numbers than `limits.MAX_UNPACKED`, or a matrix of fewer than two.
    """
    assert part.bits is not None
    total = code_bytes = numbers = 0
    for path, shapes in _layers(part):
        for short, shape in shapes.items():
            size = math.prod(shape)
            total += size
            if short not in packed_names(part):
                numbers += size
                continue
            if size < _STATS:
                raise SnellaShapeError(
                    f"{place}.layers.{path}': expected two or more numbers in {short}, got shape "
                    f"{list(shape)}"
                )
            code_bytes += packed_bytes(size, part.bits) - packed_bytes(0, part.bits)
            numbers += _STATS
    if total > limits.MAX_UNPACKED:
        raise SnellaShapeError(
            f"{place}': expected at most {limits.MAX_UNPACKED:,} numbers in the factors, got "
            f"{total:,}"
        )
    names = blob_names(component, part)
    return {names.codes: (code_bytes,), names.numbers: (numbers,)}


def unpack(
    component: str, part: Component, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """The inverse of `pack`: every layer's tensors by full name.

    Args:
        tensors: With shapes as of `packed_shapes`.

    Raises:
        SnellaValueError: Numbers that describe no factors.
    """
    assert part.bits is not None
    names = blob_names(component, part)
    codes, numbers = tensors[names.codes], tensors[names.numbers]
    found: dict[str, Tensor] = {}
    byte = place = 0
    for path, shapes in _layers(part):
        packed = [short for short in shapes if short in packed_names(part)]
        stats = numbers[place : place + _STATS * len(packed)].view(-1, _STATS)
        place += stats.numel()
        for short, stat in zip(packed, stats, strict=True):
            shape = shapes[short]
            size = packed_bytes(math.prod(shape), part.bits) - packed_bytes(0, part.bits)
            try:
                matrix = decode(codes[byte : byte + size], stat, part.bits, shape)
            except ValueError as error:
                raise SnellaValueError(
                    f"{source}: layer {component}.{path}, factor {short}: {error}; use another "
                    "checkpoint of this adapter"
                ) from None
            found[f"{component}.{path}.{short}"] = matrix
            byte += size
        for short, shape in shapes.items():
            if short not in packed:
                size = math.prod(shape)
                value = numbers[place : place + size].reshape(shape)
                found[f"{component}.{path}.{short}"] = value.clone()
                place += size
    return found


def _layers(part: Component) -> Iterator[tuple[str, Shapes]]:
    for path, row in part.layers.items():
        yield path, layer_shapes(row, part.config.get("kernel"))


def packed_names(part: Component) -> tuple[str, ...]:
    """The tensors of a layer that may be packed, by their short names; none for most methods."""
    names: tuple[str, ...] = METHODS[part.method.upper()].model.tuner_layer_cls.packed_names
    return names
