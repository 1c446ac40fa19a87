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


def shown(names: object, limit: int = 8) -> str:
    """A short, sorted list of names for an error text; says how many were left out."""
    items = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    head = ", ".join(items[:limit])
    return head if len(items) <= limit else f"{head}, ... ({len(items)} in all)"
