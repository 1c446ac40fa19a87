"""The version rules of adapter files: which formats are read, and which feature needs which.

    snella.format   "1.0", or a later one where something needs it; another major number is refused,
                    unknown fields of a later minor number are ignored with one warning
    requires        in the header: features that a reader must know

A feature that this version does not know is refused by its name.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.container import FETCH, parse_strict_json
from snell_diffusion.errors import SnellaFileError, SnellaSchemaError, quoted, shown
from snell_diffusion.tuners import METHODS

__all__ = [
    *("DIGEST_KEY", "FEATURES", "FORMAT_KEY", "HEADER_KEY", "READING"),
    *("check_features", "check_needed", "features_of", "format_for", "is_newer"),
    "version_of",
]

FORMAT_KEY, HEADER_KEY, DIGEST_KEY = "snella.format", "snella.header", "snella.digest"

_FIRST_METHOD = "snella"
# What not every reader of format 1 has, and the format that brought it. A file of an earlier one
# cannot have it, and one that has it says so: readers of before refuse it by name.
_LATER = {"conv": "1.1", "tokens": "1.1", "packed": "1.2"}
_OTHER_METHODS = "1.2"
# What a reader of this version can compute. A writer lists what its adapter needs in `requires`.
FEATURES = frozenset({*_LATER, *(method.stored_as for method in METHODS.values())})
_SINCE = {feature: _LATER.get(feature, _OTHER_METHODS) for feature in FEATURES - {_FIRST_METHOD}}

READING = f"the file is damaged or was not written by snell_diffusion: {FETCH}"


def features_of(methods: Set[str], kinds: Set[str], words: bool, packed: bool = False) -> set[str]:
    """What a reader must know: the methods, and what not every reader of the format has."""
    later = {"conv": "conv2d" in kinds, "tokens": words, "packed": packed}
    return {*methods, *(feature for feature, used in later.items() if used)}


def version_of(text: str) -> tuple[int, int]:
    """A format's major and minor number."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def format_for(features: set[str]) -> str:
    """The earliest format that has these features, so that older readers take what they can."""
    return max(
        (_SINCE[feature] for feature in features & set(_SINCE)),
        key=version_of,
        default=limits.PLAIN_FORMAT,
    )


def is_newer(metadata: Mapping[str, str], source: str) -> bool:
    """Whether the file's format is a later minor version than ours.

    Raises:
        SnellaSchemaError: It is no version.
        SnellaFileError: Another major version.
    """
    text = metadata[FORMAT_KEY]
    if not limits.VERSION.fullmatch(text):
        raise SnellaSchemaError(
            f"{source}: field {FORMAT_KEY!r}: expected a version such as '{limits.FORMAT}', got "
            f"{quoted(text)}; {READING}"
        )
    major, _, minor = text.partition(".")
    ours = limits.FORMAT.partition(".")
    if major != ours[0]:
        raise SnellaFileError(
            f"{source}: field {FORMAT_KEY!r}: expected {ours[0]}.x, which this version reads, got "
            f"{text}; {_what_to_install(_header_table(metadata, source))}"
        )
    return int(minor) > int(ours[2])


def check_features(data: Mapping[str, Any], source: str) -> None:
    """Refuse what this version cannot compute; before all else in the header of a later version.

    Raises:
        SnellaFileError: Names what is not known, and what to install.
    """
    requires = data.get("requires")
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        return  # the schema says what is wrong with it
    unknown = sorted(set(requires) - FEATURES)
    if unknown:
        raise SnellaFileError(
            f"{source}: header field 'requires': expected features this version knows "
            f"({shown(FEATURES)}), got {shown(map(quoted, unknown))}; {_what_to_install(data)}"
        )


def check_needed(
    features: Set[str], requires: Sequence[str], version: str, source: str, hint: str
) -> None:
    """A feature of a later format is named in `requires`, and the format is not earlier.

    Args:
        features: What the file uses.
        version: The format it says it is of.
        hint: What an error tells to do next.

    Raises:
        SnellaSchemaError: Names the first feature that is not.
    """
    for feature in sorted(features & set(_SINCE)):
        if feature not in requires:
            raise SnellaSchemaError(
                f"{source}: header field 'requires': expected {feature!r}, which the file uses, "
                f"got {shown(requires)}; {hint}"
            )
        if version_of(version) < version_of(_SINCE[feature]):
            raise SnellaSchemaError(
                f"{source}: header field 'format': expected {_SINCE[feature]} or later, which has "
                f"{feature!r}, got {version}; {hint}"
            )


def _header_table(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """The header of another format, as far as it is JSON; empty if not."""
    try:
        return parse_strict_json(metadata.get(HEADER_KEY, ""), source, limits.MAX_FIELDS)
    except SnellaFileError:
        return {}


def _what_to_install(data: Mapping[str, Any]) -> str:
    """The next step for a file of another version: the writer's own, if it tells a plain number."""
    writer = data.get("writer")
    known = limits.WRITER.fullmatch(writer) if isinstance(writer, str) else None
    if known is None:
        return "install another version of snell_diffusion: pip install --upgrade snell-diffusion"
    return (
        f"install snell_diffusion {known[1]}, which wrote it, or a later version: "
        f"pip install --upgrade 'snell-diffusion>={known[1]}'"
    )
