"""The rows of the layer table: one adapted module each, and the tensors that it has.

SNELLA's rows tell sizes and sparsity, from which the shapes of its tensors follow. Rows of other
methods list the shapes (`tensors`, format 1.2), as no two methods have the same ones.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from snell_diffusion.adapters import limits
from snell_diffusion.errors import SnellaSchemaError, quoted, shown

__all__ = ["Layer", "check_row", "completed", "layer_shapes", "row_data"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Sizes = Annotated[list[int], Field(max_length=limits.MAX_DIMENSIONS)]

_SPARSE = ("r", "heads", "sparsity", "kept")
"""What a row of SNELLA tells, and no other's."""
_MIXED = ("alpha", "beta", "gamma")


class Layer(BaseModel):
    """One adapted module: kind, size, and either SNELLA's sizes and levels or tensor shapes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kind: Literal["linear", "conv2d", "norm"] = "linear"
    # [out features, in features]; of a convolution the flattened kernels of one output, of a norm
    # [features, 1]
    shape: Annotated[list[int], Field(min_length=2, max_length=2)]
    r: Annotated[int, Field(ge=1, le=limits.MAX_RANK)] | None = None  # columns of A and B together
    heads: Annotated[int, Field(ge=1, le=limits.MAX_HEADS)] | None = None
    sparsity: Annotated[float, Field(ge=0.0, le=1.0)] | None = None  # share of zeros
    threshold: Annotated[Finite, Field(ge=0.0)] | None = None  # magnitude; None: by the sparsity
    kept: Annotated[int, Field(ge=0)] | None = None  # entries that survive
    # Only of a convolution: kernel [height, width] and groups.
    kernel: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    groups: Annotated[int, Field(ge=1, le=limits.MAX_FEATURES)] | None = None
    # Only of methods other than SNELLA: shapes of the tensors by their short names.
    tensors: Annotated[dict[str, Sizes], Field(max_length=limits.MAX_LAYER_TENSORS)] | None = None


def row_data(row: Layer, packed: bool) -> dict[str, Any]:
    """A row as a file has it; what follows from the settings is left out of packed files."""
    data = row.model_dump()
    if row.kind != "conv2d":
        del data["kernel"], data["groups"]
    if row.tensors is not None:
        for name in (*_SPARSE, "threshold"):
            del data[name]
        return data
    del data["tensors"]
    if packed:
        left_out = ["r", "heads", *(["kind"] if row.kind == "linear" else [])]
        left_out += ["threshold"] if row.threshold is None else []
        for name in left_out:
            del data[name]
    return data


def completed(row: Layer, config: Mapping[str, Any]) -> Layer:
    """A row of a packed file with what it leaves to the settings."""
    if row.tensors is not None:
        return row
    given = {name: config.get(name) for name in ("r", "heads") if getattr(row, name) is None}
    whole = {name: value for name, value in given.items() if type(value) is int}
    return row.model_copy(update=whole)


def layer_shapes(row: Layer, kernel: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors in a file, by their short names, sorted.

    Args:
        row: A checked row.
        kernel: SNELLA's setting of that name; "mixed" has three numbers more.
    """
    if row.tensors is not None:
        return {name: tuple(shape) for name, shape in sorted(row.tensors.items())}
    assert row.r is not None
    assert row.heads is not None
    columns = row.r // row.heads
    shapes: dict[str, tuple[int, ...]] = {
        "A": (row.heads, row.shape[1], columns),
        "B": (row.heads, row.shape[0], columns),
        "signs": (row.heads,),
        "sparsity": (3,),
    }
    if kernel == "mixed":
        shapes |= dict.fromkeys(_MIXED, (1,))
    if row.threshold is not None:
        shapes["threshold"] = ()
    if row.kernel is not None:
        shapes["kernel"] = (3,)
    return {f"snella_{name}": shape for name, shape in sorted(shapes.items())}


def check_row(row: Layer, method: str, place: str, hint: str) -> None:
    """What the types cannot express of a row.

    Raises:
        SnellaSchemaError: Names the field and what was expected of it.
    """
    if not all(1 <= size <= limits.MAX_FEATURES for size in row.shape):
        raise SnellaSchemaError(
            f"{place}.shape': expected sizes from 1 to {limits.MAX_FEATURES:,}, got "
            f"{quoted(row.shape)}; {hint}"
        )
    _check_kernel(row, place, hint)
    if method == "snella":
        _check_sparse(row, place, hint)
    else:
        _check_tensors(row, method, place, hint)


def _check_kernel(row: Layer, place: str, hint: str) -> None:
    extent = {row.kernel is None, row.groups is None}
    if extent != {row.kind != "conv2d"}:
        raise SnellaSchemaError(
            f"{place}.kernel': expected kernel and groups of a conv2d, and of nothing else, got "
            f"{row.kernel} and {row.groups} with kind {row.kind!r}; {hint}"
        )
    if row.kind == "norm" and row.shape[1] != 1:
        raise SnellaSchemaError(
            f"{place}.shape': expected [features, 1] of a norm, got {quoted(row.shape)}; {hint}"
        )
    if row.kernel is not None:
        height, width = row.kernel
        fits = all(1 <= size <= limits.MAX_KERNEL for size in row.kernel)
        if not fits or row.shape[1] % (height * width) or row.shape[0] % (row.groups or 1):
            raise SnellaSchemaError(
                f"{place}.kernel': expected sizes from 1 to {limits.MAX_KERNEL} whose product "
                f"divides the inputs, and groups that divide the outputs, of shape {row.shape}, "
                f"got {quoted(row.kernel)} and {row.groups}; {hint}"
            )


def _check_sparse(row: Layer, place: str, hint: str) -> None:
    missing = [name for name in _SPARSE if getattr(row, name) is None]
    if missing:
        raise SnellaSchemaError(
            f"{place}.{missing[0]}': expected it to be there, got nothing; {hint}"
        )
    if row.tensors is not None or row.kind == "norm":
        field = "tensors" if row.tensors is not None else "kind"
        raise SnellaSchemaError(
            f"{place}.{field}': expected none such of method 'snella', got "
            f"{quoted(getattr(row, field))}; {hint}"
        )
    assert row.r is not None
    assert row.heads is not None
    assert row.kept is not None
    distances = row.heads * row.shape[0] * row.shape[1]
    if distances > limits.MAX_DISTANCES:
        raise SnellaSchemaError(
            f"{place}.shape': expected at most {limits.MAX_DISTANCES:,} as product of sizes and "
            f"heads, all of which memory must hold, got {distances:,} ({row.shape}, "
            f"heads={row.heads}); {hint}"
        )
    if row.r % row.heads:
        raise SnellaSchemaError(
            f"{place}.heads': expected a divisor of r={row.r}, got {row.heads}; {hint}"
        )
    if row.kept > row.shape[0] * row.shape[1]:
        raise SnellaSchemaError(
            f"{place}.kept': expected at most {row.shape[0] * row.shape[1]}, the entries of "
            f"shape {row.shape}, got {quoted(row.kept)}; {hint}"
        )


def _check_tensors(row: Layer, method: str, place: str, hint: str) -> None:
    found = [name for name in (*_SPARSE, "threshold") if getattr(row, name) is not None]
    if row.tensors is None or found:
        raise SnellaSchemaError(
            f"{place}.tensors': expected the shapes of the tensors of method {method!r} and "
            f"nothing of SNELLA's, got {shown(found) or 'no shapes'}; {hint}"
        )
    if row.shape[0] * row.shape[1] > limits.MAX_DISTANCES:
        raise SnellaSchemaError(
            f"{place}.shape': expected at most {limits.MAX_DISTANCES:,} entries, got {row.shape}; "
            f"{hint}"
        )
    for name, sizes in row.tensors.items():
        plain = limits.FIELD_TENSOR.fullmatch(name) and name.startswith(f"{method}_")
        fits = all(0 <= size <= limits.MAX_DISTANCES for size in sizes)
        if not plain or not fits or math.prod(sizes) > limits.MAX_DISTANCES:
            raise SnellaSchemaError(
                f"{place}.tensors': expected names that begin with '{method}_' and shapes of at "
                f"most {limits.MAX_DISTANCES:,} numbers, got {quoted(name)}: {quoted(sizes)}; "
                f"{hint}"
            )
