"""Value types that only the diffusion trainer's records have."""

from typing import Annotated

from pydantic import AfterValidator

from snell_diffusion.adapters import limits


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
