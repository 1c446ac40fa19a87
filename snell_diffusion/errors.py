"""Every error this package raises about adapters; messages name what, where, expected, came, next.

    SnellaError
    ├── SnellaFileError        the container or its header cannot be read or written
    │   └── SnellaSchemaError  one header field has the wrong type, range or value
    ├── SnellaKeyError         tensors or modules are missing, unknown or named twice
    ├── SnellaShapeError       a tensor does not fit its module
    ├── SnellaValueError       a value is out of range, not finite, or not allowed in this state
    ├── SnellaConfigError      a method's settings are unknown or contradict each other
    └── SnellaBaseError        the adapter was trained for another base model

The classes are public: code may catch `SnellaError` for all of them. The value-like ones are also
`ValueError`s and the key-like one is a `KeyError`, so that callers who know nothing of this package
still catch them.
"""

from collections.abc import Iterable
from reprlib import Repr

_SHORT = Repr()
_SHORT.maxlist = _SHORT.maxtuple = 12
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 160
MAX_NAME = 160  # characters of one name in a list; longer ones are cut


class SnellaError(Exception):
    """Base of all errors of this package."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would show the text in quotes.
        return str(self.args[0]) if self.args else ""


class SnellaFileError(SnellaError, ValueError):
    """An adapter file cannot be read or written."""


class SnellaSchemaError(SnellaFileError):
    """A field of an adapter file's header has the wrong type, range or value."""


class SnellaKeyError(SnellaError, KeyError):
    """Tensors, layers or adapters are missing, unknown or already there."""


class SnellaShapeError(SnellaError, ValueError):
    """A tensor's shape does not fit the layer it is for."""


class SnellaValueError(SnellaError, ValueError):
    """A value is out of its range, not finite, or the operation is not allowed in this state."""


class SnellaConfigError(SnellaError, ValueError):
    """Settings of a method are unknown, mistyped or contradict each other."""


class SnellaBaseError(SnellaError, ValueError):
    """An adapter was trained for another base model than the one it is loaded into."""


def shown(names: Iterable[object], limit: int = 8) -> str:
    """A short, sorted list of names for an error text; says how many were left out."""
    items = sorted(str(name) for name in names)
    head = ", ".join(printable(item[:MAX_NAME]) for item in items[:limit])
    return head if len(items) <= limit else f"{head}, ... ({len(items)} in all)"


def quoted(value: object, limit: int = 80) -> str:
    """A value out of a file for an error text: its repr in ASCII, cut to `limit` characters.

    ASCII, because two names that look alike on the screen may differ. Of a large table or list only
    the start is looked at.
    """
    if isinstance(value, str):
        text = ascii(value[: limit + 1])
    else:
        text = _SHORT.repr(value).encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """The text with everything that does not print as itself escaped: ESC becomes `\\x1b`.

    A terminal obeys control characters, whoever wrote them. Covers line breaks, marks that reverse
    the reading direction, and lone surrogates, which no encoding takes.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
