"""Comparisons: a grid of requests over two of strength, sparsity, seed, prompt and adapter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from snell_diffusion.app.drawing import DrawRequest
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaValueError, quoted

Kind = Literal["strength", "sparsity", "seed", "prompt", "adapter"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AS_TRAINED = "as trained"
NO_ADAPTER = "base model alone"


@dataclass(frozen=True)
class Axis:
    """What changes along the rows or the columns.

    Attributes:
        kind: What it is.
        values: Its values in order; for adapters ids, where "" is the base model alone.
        labels: What the grid says beside them.
    """

    kind: Kind
    values: tuple[Any, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A comparison that can be drawn.

    Attributes:
        rows, columns: Its axes.
        requests: One for each picture, row by row.
    """

    rows: Axis
    columns: Axis
    requests: tuple[DrawRequest, ...]

    def in_rows(self, pictures: Sequence[Any]) -> list[list[Any]]:
        """Pictures in the order of the requests, as rows."""
        width = len(self.columns.values)
        return [list(pictures[at : at + width]) for at in range(0, len(pictures), width)]


def read_axis(
    kind: Any, text: Any, adapters: Sequence[str], names: Mapping[str, str], limits: Limits = LIMITS
) -> Axis:
    """An axis from what was typed or chosen.

    Args:
        kind: One of KINDS.
        text: Numbers separated by commas, spaces or lines; prompts one a line. Unused for adapters.
        adapters: Ids that were chosen; "" is the base model alone. Used for adapters only.
        names: What to call each adapter.
        limits: How many pictures a comparison may have.

    Raises:
        SnellaValueError: No such kind, no value, too many, one twice, or one that is no number.
    """
    if kind not in KINDS:
        raise SnellaValueError(f"compare one of {', '.join(KINDS)}, not {quoted(kind, 40)}")
    values = list(adapters) if kind == "adapter" else _typed(kind, text)
    if not values:
        raise SnellaValueError(f"the {kind} has no values: {_HOW[kind]}")
    if len(values) > limits.cells:
        raise SnellaValueError(
            f"the {kind} has {len(values)} values; a comparison has up to {limits.cells} pictures"
        )
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise SnellaValueError(f"the {kind} {quoted(twice, 60)} is given twice: leave one out")
    return Axis(kind, tuple(values), tuple(_label(kind, value, names) for value in values))


_HOW = {
    "strength": "write numbers separated by commas, such as 0, 0.5, 1",
    "sparsity": f"write numbers from 0 to 1 separated by commas, or {AS_TRAINED}",
    "seed": "write whole numbers separated by commas, such as 0, 1, 2",
    "prompt": "write one prompt on each line",
    "adapter": "choose at least one from the list",
}


def _typed(kind: Kind, text: Any) -> list[Any]:
    if not isinstance(text, str):
        raise SnellaValueError(f"the {kind} must be given as text: {_HOW[kind]}")
    if kind == "prompt":
        return [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    text = re.sub(AS_TRAINED.replace(" ", r"\s+"), "trained", text, flags=re.IGNORECASE)
    return [_number(kind, part) for part in re.split(r"[\s,;]+", text) if part]


def _number(kind: Kind, text: str) -> float | int | None:
    if kind == "sparsity" and text.lower() == "trained":
        return None
    try:
        return int(text) if kind == "seed" else float(text)
    except ValueError:
        raise SnellaValueError(
            f"the {kind} {quoted(text, 40)} is not a number: {_HOW[kind]}"
        ) from None


def _label(kind: Kind, value: Any, names: Mapping[str, str]) -> str:
    if kind == "adapter":
        return names[value] if value else NO_ADAPTER
    if kind == "prompt":
        return str(value)
    if value is None:
        return f"{kind} {AS_TRAINED}"
    return f"{kind} {value:g}" if isinstance(value, float) else f"{kind} {value}"


def plan(common: Mapping[str, Any], rows: Axis, columns: Axis, limits: Limits = LIMITS) -> Grid:
    """Every combination of rows and columns as a request.

    Args:
        common: Fields of a `DrawRequest` that all pictures share.
        rows: Down.
        columns: Across; of another kind.
        limits: Bounds of a request, and of how many there may be.

    Raises:
        SnellaValueError: Both axes are of one kind, too many pictures, a strength or sparsity
            without an adapter, or a value out of its range.
    """
    if rows.kind == columns.kind:
        raise SnellaValueError(
            f"rows and columns are both the {rows.kind}: choose another for one of them"
        )
    cells = len(rows.values) * len(columns.values)
    if cells > limits.cells:
        raise SnellaValueError(
            f"{len(rows.values)} x {len(columns.values)} are {cells} pictures; a comparison has "
            f"up to {limits.cells}: leave some values out"
        )
    kinds = {rows.kind, columns.kind}
    if kinds & {"strength", "sparsity"} and not common["adapters"] and "adapter" not in kinds:
        raise SnellaValueError("choose an adapter first: without one these pictures are all alike")
    requests = [
        DrawRequest.of(limits, **_with(common, {rows.kind: down, columns.kind: across}))
        for down in rows.values
        for across in columns.values
    ]
    return Grid(rows, columns, tuple(requests))


def _with(common: Mapping[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """Fields of one picture; a strength is that of every adapter."""
    fields: dict[str, Any] = {
        **common,
        **{name: cell[name] for name in ("seed", "prompt") if name in cell},
    }
    worn = list(common["adapters"])
    if "adapter" in cell:
        strength = worn[0][1] if worn else 1.0
        worn = [(cell["adapter"], strength)] if cell["adapter"] else []
    if "strength" in cell:
        worn = [(name, cell["strength"]) for name, _ in worn]
    if worn and "sparsity" in cell:
        fields["sparsity"] = cell["sparsity"]
    return {**fields, "adapters": worn}


def caption(common: Mapping[str, Any], kinds: set[str], names: Mapping[str, str]) -> str:
    """What all pictures of a grid share, in a line."""
    parts = [] if "prompt" in kinds else [str(common["prompt"])]
    if "adapter" not in kinds:
        strength = "" if "strength" in kinds else " at {:g}"
        parts += [names[name] + strength.format(value) for name, value in common["adapters"]]
    parts += [] if "seed" in kinds else [f"seed {common['seed']}"]
    parts += [f"base {common['base']}", f"{common['steps']} steps, guidance {common['guidance']:g}"]
    return "; ".join(parts)
