"""Whether a file's tensors are those that its header tells of: names, dtypes, shapes, values.

Each check names the first tensor or field that does not fit. Those of dtypes and of the table need
no tensor, so they come before the body of a file is read.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.adapters.bare import has_method_tensor, method_settings
from snell_diffusion.adapters.container import POSITIONS, Head
from snell_diffusion.adapters.doubles import join_doubles
from snell_diffusion.adapters.limits import MAX_SETTING
from snell_diffusion.adapters.packing import blob_names, packed_names, packed_shapes
from snell_diffusion.adapters.rows import layer_shapes
from snell_diffusion.adapters.schema import Component, Header, Layer
from snell_diffusion.adapters.tokens import TENSOR
from snell_diffusion.errors import (
    SnellaFileError,
    SnellaKeyError,
    SnellaSchemaError,
    SnellaShapeError,
    SnellaValueError,
    quoted,
    shown,
)

__all__ = ["check_dtypes", "check_finite", "check_table", "check_values"]

CHUNK = 2**20  # values looked at together: a check must not need as much memory as a tensor
AGAIN = "the file was changed after it was written: get it again from its author"
_WHOLE = ("U8", "I64")


def check_dtypes(header: Header, head: Head, source: str) -> None:
    """Whole numbers are what codes and positions are made of, and nothing else is.

    Raises:
        SnellaSchemaError: Bits of a method whose tensors are not packed.
        SnellaFileError: A tensor of another kind of numbers.
    """
    for component, part in header.components.items():
        if part.bits is not None and not packed_names(part):
            raise SnellaSchemaError(
                f"{source}: header field 'components.{component}.bits': expected none of method "
                f"{part.method!r}, whose tensors are not packed, got {part.bits}; {AGAIN}"
            )
    codes = {
        blob_names(component, part).codes
        for component, part in header.components.items()
        if part.bits is not None
    }
    positions = tuple(f"_{kind}" for kind in POSITIONS)
    for name, entry in head.entries.items():
        expected = "U8" if name in codes else "I64" if name.endswith(positions) else None
        if expected != (entry.dtype if entry.dtype in _WHOLE else None):
            raise SnellaFileError(
                f"{source}: tensor {quoted(name, 200)}: expected {expected or 'floats'}, got "
                f"{entry.dtype}; {AGAIN}"
            )


def check_table(header: Header, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """A file may only hold tensors that its own layer table generates, and each layer some.

    Raises:
        SnellaKeyError: Tensors without a layer, or layers without tensors.
        SnellaShapeError: Shapes that do not fit the table.
    """
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


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinite numbers.

    Raises:
        SnellaValueError: Names the first tensor that has some, and how many.
    """
    for name, tensor in tensors.items():
        bad = _count_not_finite(tensor)
        if bad:
            raise SnellaValueError(
                f"{source}: tensor {quoted(name, 200)}: expected finite numbers, got {bad:,} "
                f"NaN or infinite ones of {tensor.numel():,}; use another checkpoint of this "
                "adapter"
            )


def check_values(header: Header, tensors: Mapping[str, Tensor], source: str) -> None:
    """What tensors and header both tell must agree.

    Raises:
        SnellaSchemaError: A setting in the header differs.
        SnellaValueError: A level, threshold or kernel differs, or is no number that files hold.
    """
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
