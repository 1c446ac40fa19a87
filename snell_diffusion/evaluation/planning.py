"""What the plans of all comparisons share: their files, their names, and fair tuning."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import yaml
from pydantic import AfterValidator, TypeAdapter, ValidationError

from snell_diffusion.errors import SnellaConfigError

_NAME = re.compile(r"[^\W_][^/\\\x00-\x1f]{0,79}")
_RESERVED = "--"  # separates method, subject and seed in the name of a run


def _file_name(value: str) -> str:
    if not _NAME.fullmatch(value) or _RESERVED in value or value.endswith((".", " ")):
        raise ValueError(
            "should begin with a letter or digit and hold at most 80 characters, no slash and no "
            "'--', since files are named after it"
        )
    return value


Name = Annotated[str, AfterValidator(_file_name)]
"""A name that files can have."""


class Tunes(Protocol):
    """Learning rates that methods try before their reported runs."""

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Rates of every method that has none of its own."""

    @property
    def own(self) -> Mapping[str, tuple[float, ...]]:
        """Rates of single methods."""


_Plan = TypeVar("_Plan")


def read_plan(kind: type[_Plan], path: Path) -> _Plan:
    """Read a plan from a YAML file.

    Args:
        kind: Its dataclass.
        path: The file.

    Raises:
        SnellaConfigError: No such file, no YAML, or what it says is unknown or contradictory.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SnellaConfigError(f"plan {path} cannot be read: {error}") from error
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc']))} {e['msg'].removeprefix('Value error, ')}".strip()
            for e in error.errors()
        ]
        raise SnellaConfigError(f"plan {path}: " + "; ".join(lines)) from error


def require_each_once(what: str, names: Sequence[object]) -> None:
    """Refuse a list that is empty or names something twice.

    Raises:
        ValueError: Says which list, `what`.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{what} should name at least one, each once")


def require_reference(reference: str, methods: Collection[str]) -> None:
    """Refuse a reference that is no method of the plan.

    Raises:
        ValueError: Lists the methods.
    """
    if reference not in methods:
        raise ValueError(f"reference '{reference}' is no method; known: {', '.join(methods)}")


def rates(tune: Tunes | None, method: str) -> tuple[float, ...]:
    """Learning rates that a method tries; none without `tune`."""
    return () if tune is None else tune.own.get(method, tune.learning_rates)


def require_fair(tune: Tunes, methods: Collection[str]) -> None:
    """Refuse trials of which one method would have more than another.

    Raises:
        ValueError: Names the method, or what is none.
    """
    strange = sorted(set(tune.own) - set(methods))
    if strange:
        raise ValueError(f"tune.own names no method: {', '.join(strange)}")
    for method in methods:
        tried = len(set(rates(tune, method)))
        if tried != len(tune.learning_rates):
            raise ValueError(
                f"tune.own gives {method} {tried} learning rates; every method should try "
                f"{len(tune.learning_rates)}"
            )
