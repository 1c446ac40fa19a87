"""Value types and help texts that the configuration records share."""

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from snell_diffusion.adapters import limits

Count = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=limits.MAX_RANK)]
Heads = Annotated[int, Field(ge=1, le=limits.MAX_HEADS)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

FROZEN: Any = {"frozen": True, "kw_only": True, "config": {"extra": "forbid"}}


def described(default: Any, text: str) -> Any:
    """A field with its default and its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def pairs(value: Any) -> Any:
    """A table of YAML as the name=value texts of a command line; anything else as it is."""
    return [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
