"""Value types and help texts that the configuration records share."""

import ast
from collections.abc import Iterable
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from snell_diffusion.adapters import limits
from snell_diffusion.tuners.recipes import RECIPES

Count = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=limits.MAX_RANK)]
Heads = Annotated[int, Field(ge=1, le=limits.MAX_HEADS)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Precision = Literal["no", "bf16", "fp16"]
"""What a frozen base and its activations are computed in."""
TrackerName = Literal["none", "tensorboard", "wandb"]
"""Who is told the numbers of a run beside its log.jsonl."""

MethodName: Any = Literal[tuple(RECIPES)]
"""A method by name, as `--list-methods` lists them."""

FROZEN: Any = {"frozen": True, "kw_only": True, "config": {"extra": "forbid"}}


def described(default: Any, text: str) -> Any:
    """A field with its default and its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def pairs(value: Any) -> Any:
    """A table of YAML as the name=value texts of a command line; anything else as it is."""
    return [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value


def named_pairs(value: list[str]) -> list[str]:
    """name=value texts as they are, once each is one.

    Raises:
        ValueError: One is not; tells which.
    """
    for pair in value:
        if not pair.partition("=")[0].isidentifier() or "=" not in pair:
            raise ValueError(f"expected name=value, got '{pair}'")
    return value


def named_values(texts: Iterable[str]) -> dict[str, Any]:
    """What name=value texts say: values as Python literals, or else the text itself."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        found[name] = literal(value)
    return found


def literal(text: str) -> Any:
    """A Python literal (numbers, true or false, None, quoted text), or else the text itself."""
    if text in ("true", "false"):  # as YAML and people spell them
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
