"""The typed header of format 1.0, its parser with the version rules, and the digest.

The container's `__metadata__` holds three texts (and `format: pt`, which other tools expect):

    snella.format   "1.0"; another major number is refused, unknown fields of a later minor number
                    are ignored with one warning
    snella.header   JSON of `Header`, the only description of the tensors that is trusted
    snella.digest   "sha256:" + hex over the header text and every tensor (see `digest`)
"""

import hashlib
import json
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
from snell_diffusion.adapters.container import parse_strict_json, tensor_bytes
from snell_diffusion.errors import SnellaFileError, SnellaSchemaError, shown

FORMAT_KEY, HEADER_KEY, DIGEST_KEY = "snella.format", "snella.header", "snella.digest"

# What a reader of this version can compute. A writer lists what its adapter needs in `requires`.
FEATURES = frozenset({"snella"})

Text = Annotated[str, StringConstraints(max_length=limits.MAX_STRING)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Names = Annotated[list[Text], Field(max_length=64)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _is_scalar(value: Any, longest: int) -> bool:
    if isinstance(value, str):
        return len(value) <= longest
    return value is None or isinstance(value, (bool, int, float))


def _setting(value: Any) -> Any:
    """A value of a method's config; its exact type and range are the config class's to check."""
    items = value if isinstance(value, list) and len(value) <= 64 else [value]
    if not all(_is_scalar(item, limits.MAX_STRING) for item in items):
        raise ValueError(f"expected a number, text of up to {limits.MAX_STRING}, or list of those")
    return value


def _note(value: Any) -> Any:
    if not _is_scalar(value, limits.MAX_PROMPT):
        raise ValueError(f"expected a number or a text of at most {limits.MAX_PROMPT} characters")
    return value


Setting = Annotated[Any, AfterValidator(_setting)]
Note = Annotated[Any, AfterValidator(_note)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Layer(_Strict):
    """One adapted module: kind, size, the factors' size, and what the threshold leaves of it."""

    kind: Literal["linear"]
    shape: Annotated[list[int], Field(min_length=2, max_length=2)]  # [out features, in features]
    r: Annotated[int, Field(ge=1, le=limits.MAX_RANK)]  # columns of A and B, over all heads
    heads: Annotated[int, Field(ge=1, le=limits.MAX_HEADS)]
    sparsity: Annotated[float, Field(ge=0.0, le=1.0)]  # share of entries that are zero
    threshold: Annotated[Finite, Field(ge=0.0)] | None  # magnitude; None: taken from the sparsity
    kept: Annotated[int, Field(ge=0)]  # entries that survive


class Base(_Strict):
    """The model a component was trained on; `config_hash` as in `identity.config_hash`."""

    model: Text = Field(alias="class")
    config_hash: Hash


class Component(_Strict):
    """One adapted part of a pipeline: method, settings, base model, and literal layer table."""

    method: Text
    config: Annotated[dict[str, Setting], Field(max_length=128)]
    base: Base | None  # None: read from a bare state dict, which does not know it
    layers: Annotated[dict[str, Layer], Field(min_length=1, max_length=limits.MAX_LAYERS)]


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

    def to_json(self) -> str:
        """The text that goes into a file: compact, numbers exact, layers in the model's order."""
        data = self.model_dump(by_alias=True)
        return json.dumps(data, separators=(",", ":"), allow_nan=False)


def parse_header(metadata: Mapping[str, str], source: str) -> Header:
    """The header of a container, checked field by field.

    Raises:
        SnellaFileError: No adapter of this package, another major format, or unknown features.
        SnellaSchemaError: A field is missing, unknown, mistyped or out of range.
    """
    if FORMAT_KEY not in metadata or HEADER_KEY not in metadata or DIGEST_KEY not in metadata:
        raise SnellaFileError(
            f"{source}: safetensors, but not a SNELLA adapter (expected {FORMAT_KEY}, {HEADER_KEY} "
            f"and {DIGEST_KEY} in its metadata, found {shown(metadata) or 'none'}); "
            "load LoRA files with load_lora_weights"
        )
    newer = _check_version(metadata[FORMAT_KEY], source)
    data = parse_strict_json(metadata[HEADER_KEY], f"{source}: {HEADER_KEY}")
    header = header_from(data, source, ignore_unknown=newer)
    if header.format != metadata[FORMAT_KEY]:
        raise SnellaSchemaError(
            f"{source}: header field 'format' is {header.format!r}, the file says "
            f"{metadata[FORMAT_KEY]!r}; fetch the file again"
        )
    unknown = sorted(set(header.requires) - FEATURES)
    if unknown:
        raise SnellaFileError(
            f"{source}: needs {shown(unknown)}, this version knows {shown(FEATURES)}; "
            f"written by {header.writer}: upgrade snell_diffusion to at least that version"
        )
    return header


def _check_version(text: str, source: str) -> bool:
    """True if the file's format is a later minor version of ours; raises for another major one."""
    major, _, minor = text.partition(".")
    if not (major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise SnellaSchemaError(f"{source}: {FORMAT_KEY} is {text!r}, expected e.g. '1.0'")
    ours = limits.FORMAT.partition(".")
    if major != ours[0]:
        raise SnellaFileError(
            f"{source}: format {text}, this version reads format {ours[0]}.x; "
            f"install a version of snell_diffusion that reads format {major}"
        )
    return int(minor) > int(ours[2])


def header_from(data: dict[str, Any], source: str, ignore_unknown: bool = False) -> Header:
    """A `Header` from plain data; with `ignore_unknown`, fields we do not know cost one warning.

    Raises:
        SnellaSchemaError: The first field that does not fit, with what it should be.
    """
    try:
        header = Header.model_validate(data)
    except ValidationError as error:
        extra = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
        if not (ignore_unknown and extra):
            raise _schema_error(error, source) from None
        names = shown({".".join(map(str, location)) for location in extra})
        warnings.warn(f"{source}: written by a later version; ignored: {names}", stacklevel=4)
        for location in extra:
            _drop(data, location)
        return header_from(data, source)
    _check_names(header, source)
    return header


def _schema_error(error: ValidationError, source: str) -> SnellaSchemaError:
    first = error.errors()[0]
    field = ".".join(str(part)[:80] for part in first["loc"])
    came = repr(first["input"])
    came = came if len(came) <= 80 else f"{came[:77]}..."
    return SnellaSchemaError(
        f"{source}: header field {field!r}: {first['msg']}; came {came}; "
        "the file is damaged or not written by snell_diffusion"
    )


def _drop(data: Any, location: tuple[Any, ...]) -> None:
    for part in location[:-1]:
        data = data[part]
    data.pop(location[-1], None)


def _check_names(header: Header, source: str) -> None:
    """Names the type system cannot express: components, literal module paths, metadata keys."""
    for name in header.components:
        _match(limits.COMPONENT_NAME, name, "component", source)
    for name in header.metadata:
        _match(limits.FIELD_NAME, name, "metadata", source)
    total = sum(len(part.layers) for part in header.components.values())
    if total > limits.MAX_LAYERS:
        raise SnellaSchemaError(f"{source}: {total} layers, expected at most {limits.MAX_LAYERS}")
    for component in header.components.values():
        for path, layer in component.layers.items():
            _match(limits.MODULE_PATH, path, "layer", source)
            if not all(1 <= size <= limits.MAX_FEATURES for size in layer.shape):
                raise SnellaSchemaError(
                    f"{source}: layer {path!r} has shape {layer.shape}, "
                    f"expected sizes from 1 to {limits.MAX_FEATURES}"
                )


def _match(pattern: Any, name: str, what: str, source: str) -> None:
    if len(name) > limits.MAX_STRING or not pattern.fullmatch(name):
        raise SnellaSchemaError(
            f"{source}: {what} name {name[:80]!r} is not a plain name "
            f"(letters, digits, underscores{', dots between' if what == 'layer' else ''})"
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
