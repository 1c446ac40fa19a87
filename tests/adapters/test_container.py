"""The container: the safetensors library and we read each other, and every damage is named."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from snell_diffusion.adapters import container
from snell_diffusion.adapters.limits import MAX_HEADER_BYTES
from snell_diffusion.errors import SnellaFileError
from tests.adapters.files import container as raw

SAMPLE = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.25], dtype=torch.float16),
    "brain": torch.tensor([[3.0]], dtype=torch.bfloat16),
    "level": torch.tensor([0.1, -0.2, 0.3]),
    "empty": torch.empty(0, 4),
}


def read(data: bytes) -> dict[str, torch.Tensor]:
    import io

    stream = io.BytesIO(data)
    head = container.read_head(stream, len(data), "x.safetensors")
    return container.read_tensors(stream, head, "x.safetensors")


def assert_same(came: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert came.keys() == expected.keys()
    for name, tensor in expected.items():
        assert came[name].dtype == tensor.dtype
        assert torch.equal(came[name], tensor)


def test_reads_what_the_safetensors_library_writes() -> None:
    assert_same(read(save(SAMPLE, {"format": "pt"})), SAMPLE)


def test_the_safetensors_library_reads_what_it_writes() -> None:
    assert_same(load(container.encode(SAMPLE, {"format": "pt"})), SAMPLE)


def test_equal_content_gives_equal_bytes_whatever_the_order() -> None:
    backwards = dict(reversed(SAMPLE.items()))
    texts = {"b": "2", "a": "1"}
    assert container.encode(SAMPLE, texts) == container.encode(
        backwards, dict(reversed(texts.items()))
    )


def test_tensors_do_not_alias_the_file_or_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(container.encode(SAMPLE, {}))
    stream, size = container.open_regular(path)
    with stream:
        tensors = container.read_tensors(stream, container.read_head(stream, size, "x"), "x")
    path.write_bytes(b"\0" * size)
    assert_same(tensors, SAMPLE)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


DAMAGE = {
    "empty": (b"", "the file has 0 bytes: download"),
    "seven bytes": (b"1234567", "the file has 7 bytes"),
    "pickle": (b"\x80\x04\x95" + b"a" * 40, "it looks like a Python pickle, which can run code"),
    "zip": (b"PK\x03\x04" + b"\0" * 4 + b"z" * 40, "looks like a zip archive"),
    "html": (b"<!DOCTYPE html><html></html>", "it looks like HTML or XML"),
    "noise": (b"\x07" * 40, "announce 506,381,209,866,536,711; this is no SNELLA adapter"),
    "huge header": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        "header of at most 4,194,304 bytes",
    ),
    "overflowing header": (
        struct.pack("<Q", 2**64 - 1) + b"{}",
        "announce 18,446,744,073,709,551,615",
    ),
    "header cut": (raw({"t": entry()})[:20], "the whole file has only 20: it was cut off"),
    "not json": (raw("{nope"), "of valid JSON, got something else at character 1;"),
    "not utf-8": (struct.pack("<Q", 2) + b"\xff\xfe", "bytes that are not UTF-8 at byte 0"),
    "list": (raw("[]"), "expected a JSON table as the header, got a list"),
    "deep": (raw("[" * 100_000), "values nested too deeply"),
    "long number": (raw('{"t": ' + "9" * 5000 + "}"), "a number of thousands of digits"),
    "nan": (raw('{"t": NaN}'), "NaN is not allowed"),
    "twice": (raw('{"t": 1, "t": 2}'), "key 't' occurs twice"),
    "metadata number": (
        raw({"__metadata__": {"a": 1}}),
        "'__metadata__', entry 'a': expected a text, got 1",
    ),
    "metadata list": (raw({"__metadata__": []}), "expected a table of texts, got \\[\\]"),
    "many values": (raw("[" + "0," * 2**18 + "0]"), "expected at most 131,072 values"),
    "float64": (raw({"t": entry(dtype="F64", shape=[1])}, b"0" * 8), "got 'F64'"),
    "entry text": (raw({"t": "x"}), "'t': expected the fields dtype, shape"),
    "entry more": (raw({"t": entry(extra=1)}), "'t': expected the fields dtype, shape"),
    "int32": (
        raw({"t": entry(dtype="I32")}, b"0" * 8),
        "'dtype': expected one of F32, F16, BF16, U8, I64, got 'I32'",
    ),
    "bool": (raw({"t": entry(dtype="BOOL")}), "got 'BOOL'"),
    "float8": (raw({"t": entry(dtype="F8_E4M3")}), "got 'F8_E4M3'"),
    "complex": (raw({"t": entry(dtype="C64")}), "got 'C64'"),
    "dtype list": (raw({"t": entry(dtype=["F32"])}), "got \\['F32'\\]"),
    "negative": (raw({"t": entry(shape=[-2])}, b"0" * 8), "a list of up to 8 sizes, got"),
    "fraction": (raw({"t": entry(shape=[2.0])}, b"0" * 8), "a list of up to 8 sizes, got"),
    "true": (raw({"t": entry(shape=[True, 2])}, b"0" * 8), "a list of up to 8 sizes, got"),
    "many axes": (
        raw({"t": entry(shape=[1] * 9)}, b"0" * 4),
        "a list of up to 8 sizes, got",
    ),
    "overflow": (
        raw({"t": entry(shape=[2**31, 2**31])}, b"0" * 8),
        "expected 18,446,744,073,709,551,616 bytes for",
    ),
    "offsets": (
        raw({"t": entry(data_offsets=[0])}, b"0" * 8),
        "expected \\[begin, end\\] in bytes, got \\[0\\]",
    ),
    "reversed": (raw({"t": entry(data_offsets=[8, 0])}, b"0" * 8), "got -8 "),
    "overlap": (
        raw({"s": entry(), "t": entry(data_offsets=[4, 12])}, b"0" * 12),
        "'t' overlaps the one before it: expected to begin at byte 8 of the body, begins at 4",
    ),
    "gap": (
        raw({"t": entry(data_offsets=[4, 12])}, b"0" * 12),
        "'t' leaves a gap: expected to begin at byte 0",
    ),
    "body cut": (
        raw({"t": entry()}, b"0" * 5),
        "expected 8 bytes of tensors, up to the end of tensor 't', got 5: the",
    ),
    "body long": (raw({"t": entry()}, b"0" * 9), "to end with tensor 't', got 1 more bytes"),
    "many": (
        raw({f"{i}": entry(shape=[0], data_offsets=[0, 0]) for i in range(16_385)}),
        "expected at most 16,384 tensors, the header lists 16,385",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_its_own_message(name: str) -> None:
    data, message = DAMAGE[name]
    with pytest.raises(SnellaFileError, match=message) as caught:
        read(data)
    assert str(caught.value).startswith("x.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    import io

    data = container.encode(SAMPLE, {})
    head = container.read_head(io.BytesIO(data), len(data), "x")
    with pytest.raises(SnellaFileError, match=r"became shorter while tensor 'a.weight' was read"):
        container.read_tensors(io.BytesIO(b"123"), head, "x")


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    message = "cannot be opened" if kind == "missing" else "expected a regular file"
    with pytest.raises(SnellaFileError, match=message):
        container.open_regular(path)


def test_other_dtypes_are_not_written() -> None:
    with pytest.raises(
        SnellaFileError, match=r"'t': expected one of F32, F16, BF16, U8, I64, got torch.int32"
    ):
        container.encode({"t": torch.zeros(1, dtype=torch.int32)}, {})


def test_more_values_than_a_reader_takes_are_not_written() -> None:
    with pytest.raises(SnellaFileError, match=r"131,072 values, got 0, .* and 200,00"):
        container.encode({}, {"note": "," * 200_000})


def test_a_header_beyond_the_limit_is_not_written() -> None:
    with pytest.raises(SnellaFileError, match="at most 16,384 tensors and a header of 4,194,304"):
        container.encode({}, {"note": "x" * MAX_HEADER_BYTES})
