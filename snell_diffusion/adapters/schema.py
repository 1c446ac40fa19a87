"""The typed header of format 1, its parser, and the digest.

The container's `__metadata__` holds three texts (and `format: pt`, which other tools expect):

    snella.format   "1.0", or a later one where something needs it (version rules: `formats`)
    snella.header   JSON of `Header`, the only description of the tensors that is trusted
    snella.digest   "sha256:" + hex over the header text and every tensor (see `digest`)
"""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from torch import Tensor

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.container import FETCH, parse_strict_json, tensor_bytes
from snell_diffusion.adapters.formats import (
    DIGEST_KEY,
    FEATURES,
    FORMAT_KEY,
    HEADER_KEY,
    READING,
    check_features,
    check_needed,
    features_of,
    format_for,
    is_newer,
    version_of,
)
from snell_diffusion.adapters.rows import Layer, check_row, completed, row_data
from snell_diffusion.errors import SnellaFileError, SnellaSchemaError, quoted, shown

__all__ = ["DIGEST_KEY", "FEATURES", "FORMAT_KEY", "HEADER_KEY", "READING", "WRITING"]
__all__ += ["Base", "Component", "Encoder", "Header", "Layer", "NewWord", "Origin", "Tokens"]
__all__ += ["digest", "features_of", "format_for", "header_from", "parse_header", "version_of"]

WRITING = "nothing was written: change it and save again"

Text = Annotated[str, StringConstraints(max_length=limits.MAX_STRING)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Names = Annotated[list[Text], Field(max_length=64)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _is_scalar(value: Any, longest: int) -> bool:
    if isinstance(value, str):
        return len(value) <= longest
    if isinstance(value, (bool, int)):
        return abs(value) < 2**63
    return value is None or (isinstance(value, float) and math.isfinite(value))


def _setting(value: Any) -> Any:
    """A value of a method's config; its exact type and range are the config class's to check."""
    items = value if isinstance(value, list) and len(value) <= 64 else [value]
    if not all(_is_scalar(item, limits.MAX_STRING) for item in items):
        raise ValueError(
            f"expected a finite number, a text of at most {limits.MAX_STRING} characters, or a "
            "list of at most 64 of those"
        )
    return value


def _note(value: Any) -> Any:
    if not _is_scalar(value, limits.MAX_PROMPT):
        raise ValueError(
            f"expected a finite number or a text of at most {limits.MAX_PROMPT:,} characters"
        )
    return value


Setting = Annotated[Any, AfterValidator(_setting)]
Note = Annotated[Any, AfterValidator(_note)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Base(_Strict):
    """The model a component was trained on; `config_hash` as in `identity.config_hash`."""

    model: Text = Field(alias="class")
    config_hash: Hash


class Component(_Strict):
    """One adapted part of a pipeline: method, settings, base model, and literal layer table."""

    method: Text
    config: Annotated[dict[str, Setting], Field(max_length=128)]
    base: Base | None  # None: read from a bare state dict, which does not know it
    # Bits per number of the factors, which then lie in one tensor for all layers (`packing`).
    bits: Literal[1, 2, 4, 8] | None = None
    layers: Annotated[dict[str, Layer], Field(min_length=1, max_length=limits.MAX_LAYERS)]


class NewWord(_Strict):
    """A word that prompts may use, and how many embeddings it stands for."""

    text: Annotated[str, StringConstraints(max_length=64)]
    vectors: Annotated[int, Field(ge=1, le=limits.MAX_VECTORS)]


class Encoder(_Strict):
    """A text encoder that has embeddings of the new words."""

    model: Text = Field(alias="class")
    config_hash: Hash
    size: Annotated[int, Field(ge=1, le=limits.MAX_FEATURES)]  # numbers per embedding


class Tokens(_Strict):
    """New words; every encoder has their embeddings in this order in one tensor."""

    words: Annotated[list[NewWord], Field(min_length=1, max_length=limits.MAX_WORDS)]
    encoders: Annotated[dict[str, Encoder], Field(min_length=1, max_length=limits.MAX_COMPONENTS)]

    @property
    def vectors(self) -> int:
        """Embeddings of all words together."""
        return sum(word.vectors for word in self.words)


class Origin(_Strict):
    """Where the base model came from; for people, never used to decide anything."""

    pipeline: Text | None = None
    source: Text | None = None  # hub id or name of the base, e.g. "embedded"
    revision: Text | None = None


class Header(_Strict):
    """Everything a file says about its tensors."""

    format: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")]
    writer: Text  # program and version
    requires: Names
    origin: Origin
    components: Annotated[
        dict[str, Component], Field(min_length=1, max_length=limits.MAX_COMPONENTS)
    ]
    metadata: Annotated[
        dict[str, Note], Field(max_length=limits.MAX_METADATA)
    ]  # instance_prompt, class_prompt, and a summary of the training
    tokens: Tokens | None = None

    def to_data(self) -> dict[str, Any]:
        """Plain values; fields that a file leaves out are not there."""
        data = self.model_dump(by_alias=True)
        if data["tokens"] is None:
            del data["tokens"]
        for name, part in self.components.items():
            table = data["components"][name]
            table["layers"] = {
                path: row_data(row, packed=part.bits is not None)
                for path, row in part.layers.items()
            }
            if part.bits is None:
                del table["bits"]
        return data

    def features(self) -> set[str]:
        """What a reader must know to use the file."""
        parts = self.components.values()
        kinds = {row.kind for part in parts for row in part.layers.values()}
        packed = any(part.bits is not None for part in parts)
        methods = {part.method for part in parts}
        return features_of(methods, kinds, self.tokens is not None, packed)

    def to_json(self) -> str:
        """The text that goes into a file: compact, numbers exact, layers in the model's order."""
        data = self.to_data()
        return json.dumps(data, separators=(",", ":"), allow_nan=False)


def parse_header(metadata: Mapping[str, str], source: str) -> Header:
    """The header of a container, checked field by field.

    Raises:
        SnellaFileError: No adapter of this package, another major format, or unknown features.
        SnellaSchemaError: A field is missing, unknown, mistyped or out of range.
    """
    missing = [key for key in (FORMAT_KEY, HEADER_KEY, DIGEST_KEY) if key not in metadata]
    if len(missing) == 3:
        raise SnellaFileError(
            f"{source}: safetensors, but not a SNELLA adapter: expected {shown(missing)} in field "
            f"'__metadata__', got {shown(metadata) or 'nothing'}; load LoRA files with "
            "load_lora_weights"
        )
    # First of all the version: a later one may keep the rest elsewhere.
    newer = FORMAT_KEY in metadata and is_newer(metadata, source)
    if missing:
        raise SnellaFileError(
            f"{source}: field '__metadata__': expected {shown(missing)} too, got only "
            f"{shown(metadata)}; without it the content cannot be checked: {FETCH}"
        )
    text = metadata[HEADER_KEY]
    data = parse_strict_json(text, f"{source}: field {HEADER_KEY!r}", limits.MAX_FIELDS)
    if newer:
        check_features(data, source)
    header = header_from(data, source, ignore_unknown=newer)
    if header.format != metadata[FORMAT_KEY]:
        raise SnellaSchemaError(
            f"{source}: header field 'format': expected {metadata[FORMAT_KEY]!r} as in "
            f"{FORMAT_KEY}, got {header.format!r}; {READING}"
        )
    check_features(data, source)
    return header


def header_from(
    data: dict[str, Any], source: str, ignore_unknown: bool = False, hint: str = READING
) -> Header:
    """A `Header` from plain data; with `ignore_unknown`, fields we do not know cost one warning.

    Args:
        hint: What an error tells to do next.

    Raises:
        SnellaSchemaError: The first field that does not fit, with what it should be.
    """
    try:
        header = Header.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        extra = [item["loc"] for item in faults if item["type"] == "extra_forbidden"]
        if not (ignore_unknown and extra):
            raise _schema_error(faults[0], source, hint) from None
        names = shown({".".join(map(str, location)) for location in extra})
        for location in extra:
            _drop(data, location)
        header = header_from(data, source, hint=hint)
        warnings.warn(
            f"{source}: written by {quoted(header.writer)}, a later version; ignored: {names}; "
            "upgrade snell_diffusion to use them",
            stacklevel=4,
        )
        return header
    header = _completed(header)
    _check_names(header, source, hint)
    return header


def _completed(header: Header) -> Header:
    """With what rows of packed components leave to the settings."""
    parts = {
        name: part
        if part.bits is None
        else part.model_copy(
            update={"layers": {p: completed(row, part.config) for p, row in part.layers.items()}}
        )
        for name, part in header.components.items()
    }
    return header.model_copy(update={"components": parts})


# Our own words, not pydantic's, which may change with its version; {x} comes from its context.
_EXPECTED = {
    "dict_type": "expected a table",
    "extra_forbidden": f"format {limits.FORMAT} has no such field",
    "finite_number": "expected a finite number",
    "float_type": "expected a number",
    "greater_than_equal": "expected {ge} or more",
    "int_type": "expected a whole number",
    "less_than_equal": "expected {le} or less",
    "list_type": "expected a list",
    "literal_error": "expected {expected}",
    "missing": "expected it to be there",
    "model_type": "expected a table",
    "string_pattern_mismatch": "expected a text that matches {pattern}",
    "string_too_long": "expected at most {max_length} characters",
    "string_type": "expected a text",
    "too_long": "expected at most {max_length} entries",
    "too_short": "expected {min_length} or more entries",
    "value_error": "{error}",
}


def _schema_error(fault: Any, source: str, hint: str) -> SnellaSchemaError:
    field = ".".join(str(part)[: limits.MAX_STRING] for part in fault["loc"])
    expected = _EXPECTED.get(fault["type"])
    text = expected.format(**fault.get("ctx", {})) if expected else fault["msg"]
    came = "nothing" if fault["type"] == "missing" else quoted(fault["input"])
    if fault["type"] in ("too_long", "too_short"):
        came = str(len(fault["input"]))
    return SnellaSchemaError(
        f"{source}: header field {quoted(field, 300)}: {text}, got {came}; {hint}"
    )


def _drop(data: Any, location: tuple[Any, ...]) -> None:
    for part in location[:-1]:
        data = data[part]
    data.pop(location[-1], None)


def _check_names(header: Header, source: str, hint: str) -> None:
    """What the types cannot express: names, totals, and numbers that belong together."""
    for name in header.components:
        _match(limits.COMPONENT_NAME, name, "components", source, hint)
        if name in limits.NEVER_ADAPTED:
            raise SnellaSchemaError(
                f"{source}: header field 'components': expected parts that make pictures, got "
                f"{name!r}, which no adapter may change; leave it out, or choose another file"
            )
    for name in header.metadata:
        _match(limits.FIELD_NAME, name, "metadata", source, hint)
    total = sum(len(part.layers) for part in header.components.values())
    if total > limits.MAX_LAYERS:
        raise SnellaSchemaError(
            f"{source}: header field 'components': expected at most {limits.MAX_LAYERS:,} layers "
            f"in all, got {total:,}; {hint}"
        )
    for component, part in header.components.items():
        for path, layer in part.layers.items():
            _match(limits.MODULE_PATH, path, f"components.{component}.layers", source, hint)
            place = f"{source}: header field 'components.{component}.layers.{path}"
            check_row(layer, part.method, place, hint)
    if header.tokens is not None:
        _check_tokens(header.tokens, source, hint)
    check_needed(header.features(), header.requires, header.format, source, hint)


def _check_tokens(tokens: Tokens, source: str, hint: str) -> None:
    place = f"{source}: header field 'tokens.words'"
    for word in tokens.words:
        if not limits.WORD.fullmatch(word.text):
            raise SnellaSchemaError(
                f"{place}: expected words such as '<cup>' (letters, digits, '_', '-' and '.' in "
                f"brackets), got {quoted(word.text)}; {hint}"
            )
    texts = [word.text for word in tokens.words]
    if len(set(texts)) != len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise SnellaSchemaError(f"{place}: expected each word once, got {twice!r} again; {hint}")
    if tokens.vectors > limits.MAX_TOKENS:
        raise SnellaSchemaError(
            f"{place}: expected at most {limits.MAX_TOKENS} embeddings in all, got "
            f"{tokens.vectors}; {hint}"
        )
    for name in tokens.encoders:
        _match(limits.COMPONENT_NAME, name, "tokens.encoders", source, hint)


def _match(pattern: Any, name: str, field: str, source: str, hint: str) -> None:
    if len(name) > limits.MAX_STRING or not pattern.fullmatch(name):
        dots = ", dots between" if pattern is limits.MODULE_PATH else ""
        raise SnellaSchemaError(
            f"{source}: header field {field!r}: expected plain names (letters, digits, "
            f"underscores{dots}), got {quoted(name)}; {hint}"
        )


def digest(header_json: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header text and every tensor's name, dtype, shape and bytes, sorted by name.

    Every part is preceded by its length, so that no two contents share one byte stream.
    """
    sha = hashlib.sha256()

    def feed(part: bytes | memoryview) -> None:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)

    feed(header_json.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        feed(name.encode())
        feed(str(tensor.dtype).encode())
        feed(json.dumps(list(tensor.shape)).encode())
        feed(tensor_bytes(tensor))
    return f"sha256:{sha.hexdigest()}"
