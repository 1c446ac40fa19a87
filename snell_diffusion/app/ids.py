"""Names of what visitors own: 128 random bits, which nobody guesses and nothing else looks like."""

import re
import secrets
from typing import Any

PATTERN = r"[0-9a-f]{32}"


def new_id() -> str:
    """A name that nothing has yet."""
    return secrets.token_hex(16)


def is_id(value: Any) -> bool:
    """Whether a value has the form of a name: 32 hex digits and nothing else."""
    return isinstance(value, str) and re.fullmatch(PATTERN, value) is not None
