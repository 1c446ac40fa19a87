"""Value types and help texts of the diffusion trainer's records."""

from typing import Annotated

from pydantic import AfterValidator

from snell_diffusion.adapters import limits
from snell_diffusion.training.config_types import (
    FROZEN,
    Count,
    Decay,
    Finite,
    Heads,
    MethodName,
    NotNegative,
    Positive,
    Rank,
    Share,
    Whole,
    described,
)

__all__ = [
    "FROZEN",
    "Count",
    "Decay",
    "Finite",
    "Heads",
    "MethodName",
    "NotNegative",
    "Positive",
    "Prompt",
    "Rank",
    "Share",
    "Whole",
    "described",
]


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
