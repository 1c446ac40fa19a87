"""The header: versions, unknown fields, features, limits, and the digest."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from snell_diffusion.adapters import read_adapter
from snell_diffusion.adapters.schema import FEATURES, digest, header_from, parse_header
from snell_diffusion.errors import SnellaFileError, SnellaSchemaError
from snell_diffusion.tuners import METHODS
from tests.adapters.files import header_of, rebuilt, split

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_header_survives_a_round_trip(adapter_bytes: bytes) -> None:
    metadata = split(adapter_bytes)[0]["__metadata__"]
    header = parse_header(metadata, "x")
    assert header.to_json() == metadata["snella.header"]
    assert header.metadata["instance_prompt"] == "a photo of sks cat"
    assert header.origin.source == "tiny"


def test_every_method_of_this_version_is_a_known_feature() -> None:
    assert {method.stored_as for method in METHODS.values()} <= FEATURES


def test_a_lora_file_is_told_apart() -> None:
    with pytest.raises(SnellaFileError, match=r"not a SNELLA adapter.*got format.*load_lora"):
        parse_header({"format": "pt"}, "x")


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.1"])
def test_another_major_version_is_refused(version: str, adapter_bytes: bytes) -> None:
    def change(header: dict[str, Any]) -> None:
        header["format"] = version

    with pytest.raises(SnellaFileError, match=rf"expected 1.x, .* got {version}; install snell_"):
        read_adapter(rebuilt(adapter_bytes, change, version=version))


@pytest.mark.parametrize("version", ["", "1", "one.zero", "1.0.0", "1.²"])
def test_a_version_that_is_none_is_refused(version: str, adapter_bytes: bytes) -> None:
    with pytest.raises(
        SnellaSchemaError, match=r"'snella.format': expected a version such as '1.2'"
    ):
        read_adapter(rebuilt(adapter_bytes, version=version))


def test_two_versions_in_one_file_are_refused(adapter_bytes: bytes) -> None:
    with pytest.raises(SnellaSchemaError, match=r"'format': expected '1.1' as in .*got '1.0'"):
        read_adapter(rebuilt(adapter_bytes, version="1.1"))


def add_unknown(header: dict[str, Any]) -> None:
    header["novelty"] = 1
    header["components"]["unet"]["layers"][LAYER]["colour"] = "red"


def test_unknown_fields_of_a_later_minor_version_cost_one_warning(adapter_bytes: bytes) -> None:
    def change(header: dict[str, Any]) -> None:
        add_unknown(header)
        header["format"] = "1.3"

    with pytest.warns(UserWarning, match=rf"ignored: components.unet.layers.{LAYER}.colour, nov"):
        file = read_adapter(rebuilt(adapter_bytes, change, version="1.3"))
    assert "novelty" not in json.loads(file.header.to_json())


def test_unknown_fields_of_this_version_are_refused(adapter_bytes: bytes) -> None:
    with pytest.raises(SnellaSchemaError, match=r"format 1.2 has no such field"):
        read_adapter(rebuilt(adapter_bytes, add_unknown))


def test_an_unknown_feature_is_refused_even_from_a_later_minor_version(
    adapter_bytes: bytes,
) -> None:
    def change(header: dict[str, Any]) -> None:
        header["format"] = "1.7"
        header["requires"] = ["snella", "time-travel"]

    message = (
        r"expected features .*snella.*, got 'time-travel'; install snell_diffusion 0.1.0, which"
    )
    with pytest.raises(SnellaFileError, match=message):
        read_adapter(rebuilt(adapter_bytes, change, version="1.7"))


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        *parents, last = path.replace("LAYER", LAYER.replace(".", "/")).split(".")
        node = header
        for part in parents:
            node = node[part.replace("/", ".")]
        node[last.replace("/", ".")] = value

    return change


ROW = "components.unet.layers.LAYER."
FIELDS = {
    "rank huge": (put(ROW + "r", 10**9), "expected 1024 or less, got 1000000000"),
    "rank text": (put(ROW + "r", "4"), "layers.*r': expected a whole number, got '4'"),
    "rank true": (put(ROW + "r", True), "whole number"),
    "rank zero": (put(ROW + "r", 0), "expected 1 or more"),
    "level above": (put(ROW + "sparsity", 1.5), "expected 1.0 or less"),
    "level text": (put(ROW + "sparsity", "0.5"), "expected a number"),
    "threshold negative": (put(ROW + "threshold", -1.0), "expected 0.0 or more"),
    "kept fraction": (put(ROW + "kept", 1.5), "whole number"),
    "shape long": (put(ROW + "shape", [1, 2, 3]), "at most 2 entries"),
    "shape huge": (put(ROW + "shape", [2**40, 2]), "expected sizes from 1 to"),
    "kind": (put(ROW + "kind", "conv"), "expected 'linear'"),
    "no layers": (put("components.unet.layers", {}), "1 or more entries"),
    "layers list": (put("components.unet.layers", []), "expected a table"),
    "hash": (put("components.unet.base.config_hash", "abc"), "expected a text that matches"),
    "class long": (put("components.unet.base.class", "x" * 300), "at most 256 characters"),
    "config list": (put("components.unet.config", [1]), "expected a table"),
    "config deep": (
        put("components.unet.config.r", {"a": 1}),
        "unet.config.r.*list of at most 64 of those",
    ),
    "metadata deep": (
        put("metadata.note", [[1]]),
        "metadata.note.*expected a finite number or a text",
    ),
    "metadata long": (put("metadata.note", "x" * 3000), "at most 2,048 characters"),
    "metadata name": (put("metadata.No Te", 1), "'metadata': expected plain names .*got 'No Te'"),
    "requires text": (put("requires", "snella"), "expected a list"),
    "origin extra": (put("origin.home", "x"), "no such field"),
    "components empty": (put("components", {}), "1 or more entries"),
    "component name": (put("components.a/b", {}), "components"),
    "heads": (put(ROW + "heads", 3), "expected a divisor of r=4, got 3"),
    "kept above": (put(ROW + "kept", 1025), "expected at most 1024, the entries of"),
    "metadata infinite": (put("metadata.note", 10**400), "a finite number"),
    "writer": (put("writer", None), "expected a text"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_out_of_type_or_range_are_named(name: str, adapter_bytes: bytes) -> None:
    change, message = FIELDS[name]
    with pytest.raises(SnellaSchemaError, match=message) as caught:
        read_adapter(rebuilt(adapter_bytes, change))
    assert str(caught.value).startswith("bytes")


@pytest.mark.parametrize("path", ["a..b", ".a", "a b", "a/b", "(a+)+b", "ä", "a" * 300, ""])
def test_layer_names_are_plain_paths(path: str, adapter_bytes: bytes) -> None:
    def change(header: dict[str, Any]) -> None:
        layers = header["components"]["unet"]["layers"]
        layers[path] = layers.pop(LAYER)

    with pytest.raises(SnellaSchemaError, match=r"components.unet.layers': expected plain names"):
        read_adapter(rebuilt(adapter_bytes, change))


def test_too_many_layers_are_refused(adapter_bytes: bytes) -> None:
    header = header_of(adapter_bytes)
    for component in header["components"].values():
        row = next(iter(component["layers"].values()))
        component["layers"] = {f"layer{index}": row for index in range(2100)}
    with pytest.raises(SnellaSchemaError, match="expected at most 4,096 layers in all, got 4,200"):
        header_from(header, "x")


def test_digest_depends_on_header_name_dtype_shape_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    variants = [
        ("{}", base),
        ("{ }", base),
        ("{}", {"a": base["a"], "c": base["b"]}),
        ("{}", {**base, "a": torch.zeros(3, 2)}),
        ("{}", {**base, "a": torch.zeros(6)}),
        ("{}", {**base, "b": torch.zeros(1, dtype=torch.float16)}),
        ("{}", {**base, "b": torch.zeros(1, dtype=torch.bfloat16)}),  # the same bytes
        ("{}", {**base, "b": torch.tensor([1.0000001])}),
        ("{}", {"a": base["a"]}),
    ]
    digests = {digest(text, tensors) for text, tensors in variants}
    assert len(digests) == len(variants)
    assert digest("{}", dict(reversed(base.items()))) == digest("{}", base)
