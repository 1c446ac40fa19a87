"""Value types and help texts that the configuration records share."""

from dataclasses import field
from typing import Annotated, Any

from pydantic import AfterValidator, Field

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


def _storable(value: str) -> str:
    """The adapter file tells its prompts, so what it cannot hold is refused at the start."""
    if len(value) > limits.MAX_PROMPT:
        raise ValueError(f"should have at most {limits.MAX_PROMPT} characters, has {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("should be text that UTF-8 can hold") from error
    return value


Prompt = Annotated[str, AfterValidator(_storable)]
