"""Hostile adapter files, built by code when a test needs them; none is kept in the repository.

Each case takes one good adapter of a tiny Stable Diffusion (`good`) and breaks one thing of it.
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from snell_diffusion.adapters import adapter_file_bytes
from snell_diffusion.adapters.schema import DIGEST_KEY, FORMAT_KEY, HEADER_KEY, digest
from tests.adapters.files import container, header_of, level, rebuilt, split, tensors_of
from tests.tiny_models import adapt, flux_transformer, sd15_unet, sdxl_unet, text_encoder

__all__ = ["CASES", "COUNTS", "Case", "good", "good_bytes"]

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PLACE = f"unet.{LAYER}.snella_"
TEXT_LAYER = "encoder.layers.0.self_attn.q_proj"
ROW = f"components.unet.layers.{LAYER}"
TARGETS = ["attn1.to_q", "attn2.to_v"]
HANGS = "([a-z0-9_.]+)+!"  # a pattern that takes exponential time on a plain name

Header = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One hostile file: its name, kind, and how its bytes come about."""

    name: str
    group: str
    build: Callable[[], bytes]


CASES: dict[str, Case] = {}
COUNTS = {"container": 23, "tensor": 24, "header": 20, "architecture": 5}  # what row A1 promises


def case(name: str, group: str, build: Callable[[], bytes]) -> None:
    assert name not in CASES, name
    CASES[name] = Case(name, group, build)


@cache
def good_bytes() -> bytes:
    """The file every case starts from: eight layers of a UNet and two of a text encoder."""
    data = adapter_file_bytes(
        {
            "unet": adapt(sd15_unet(), target_modules=TARGETS),
            "text_encoder": adapt(text_encoder(), seed=2, target_modules=["q_proj"]),
        },
        metadata={"instance_prompt": "a photo of sks cat", "steps": 12},
        base={"source": "tiny"},
    )
    # A release must not change the texts on record.
    return rebuilt(data, lambda header: header.update(writer="snell_diffusion 0.1.0"))


@dataclass(frozen=True)
class Good:
    """The good file taken apart."""

    data: bytes
    table: dict[str, Any]
    body: bytes
    header: Header
    tensors: Tensors


def good() -> Good:
    """A fresh copy of the good file, taken apart: a case may change it."""
    table, body = split(good_bytes())
    return Good(good_bytes(), table, body, header_of(good_bytes()), tensors_of(good_bytes()))


# Containers


def with_table(change: Callable[[dict[str, Any]], Any]) -> Callable[[], bytes]:
    """The good file with its outer JSON changed, its body as it was."""

    def build() -> bytes:
        parts = good()
        change(parts.table)
        return container(parts.table, parts.body)

    return build


def entry_change(**fields: Any) -> Callable[[], bytes]:
    return with_table(lambda table: table[PLACE + "A"].update(fields))


def raw_header(text: str) -> Callable[[], bytes]:
    return lambda: container(text, good().body)


def replaced(old: str, new: str) -> Callable[[], bytes]:
    """The outer header's text with one piece replaced."""

    def build() -> bytes:
        parts = good()
        text = json.dumps(parts.table)
        assert old in text
        return container(text.replace(old, new, 1), parts.body)

    return build


def a_pickle() -> bytes:
    # Not called by a safe reader; one that falls back to pickle would stop the test run.
    return pickle.dumps({"unet": (exit, 3)}) + b" " * 64


def a_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", a_pickle())
    return stream.getvalue()


def many_tensors(count: int) -> bytes:
    parts = good()
    end = len(parts.body)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    return container({**parts.table, **{f"t{index}": empty for index in range(count)}}, parts.body)


def overlap(table: dict[str, Any]) -> None:
    table[PLACE + "B"]["data_offsets"] = table[PLACE + "A"]["data_offsets"]


def hole() -> bytes:
    parts = good()
    last = max(parts.table, key=lambda name: parts.table[name].get("data_offsets", [0, 0])[1])
    begin, end = parts.table[last]["data_offsets"]
    parts.table[last]["data_offsets"] = [begin + 4, end + 4]
    return container(parts.table, parts.body + b"\0" * 4)


for _name, _build in {
    "empty file": lambda: b"",
    "seven bytes": lambda: good_bytes()[:7],
    "cut in the header": lambda: good_bytes()[:1000],
    "cut half-way": lambda: good_bytes()[: -len(good().body) // 2],
    "one byte short": lambda: good_bytes()[:-1],
    "trailing bytes": lambda: good_bytes() + b"PK\x05\x06" + b"\0" * 18,
    "pickle": a_pickle,
    "zip": a_zip,
    "html": lambda: b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "header length 2^64 - 1": lambda: struct.pack("<Q", 2**64 - 1) + good_bytes()[8:],
    "header length 100 MB": lambda: struct.pack("<Q", 100_000_000) + good_bytes()[8:],
    "header not utf-8": lambda: struct.pack("<Q", 4) + b'{"\xff\xfe' + good().body,
    "header not json": raw_header("{nope"),
    "header a list": raw_header("[1, 2]"),
    "header nested 100,000 deep": raw_header('{"a":' * 100_000),
    "tensor named twice": replaced(f'"{PLACE}B":', f'"{PLACE}A":'),
    "NaN in the header": replaced('"shape": [', '"shape": [NaN, '),
    "metadata of numbers": with_table(lambda table: table.update(__metadata__={"a": 1})),
    "overlap": with_table(overlap),
    "hole": hole,
    "shape that overflows": entry_change(shape=[2**32, 2**31, 2]),
    "negative size": entry_change(shape=[-2, 32, 2]),
    "16,385 tensors": lambda: many_tensors(16_385),
}.items():
    case(_name, "container", _build)


# Tensors


def with_tensors(change: Callable[[Tensors], Any]) -> Callable[[], bytes]:
    return lambda: rebuilt(good_bytes(), tensors=change)


def put(name: str, value: Tensor) -> Callable[[], bytes]:
    return with_tensors(lambda tensors: tensors.update({name: value}))


def scaled(name: str, factor: float) -> Callable[[], bytes]:
    return with_tensors(lambda tensors: tensors[name].mul_(factor))


def dropped(choose: Callable[[str], bool]) -> Callable[[], bytes]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if choose(name)]:
            del tensors[name]

    return with_tensors(change)


def of_dtype(dtype: torch.dtype) -> Callable[[], bytes]:
    """The good file with one factor of another dtype, digest right, as any other tool writes it."""

    def build() -> bytes:
        parts = good()
        parts.tensors[PLACE + "A"] = parts.tensors[PLACE + "A"].to(dtype)
        text = json.dumps(parts.header)
        right = digest(text, parts.tensors)
        return save(parts.tensors, {FORMAT_KEY: "1.0", HEADER_KEY: text, DIGEST_KEY: right})

    return build


def spoiled(change: Callable[[bytearray, int, int], Any]) -> Callable[[], bytes]:
    """The good file's bytes changed within one tensor; the digest stays."""

    def build() -> bytes:
        parts = good()
        start = len(parts.data) - len(parts.body)
        begin, end = parts.table[PLACE + "A"]["data_offsets"]
        data = bytearray(parts.data)
        change(data, start + begin, start + end)
        assert data != parts.data
        return bytes(data)

    return build


def flip(data: bytearray, begin: int, _: int) -> None:
    data[begin + 5] ^= 4


def blank(data: bytearray, begin: int, end: int) -> None:
    data[begin:end] = bytes(end - begin)


def swap(data: bytearray, begin: int, end: int) -> None:
    half = (end - begin) // 2
    data[begin : begin + half], data[begin + half : end] = (
        data[begin + half : end],
        data[begin : begin + half],
    )


FACTOR = (2, 32, 2)

for _name, _build in {
    "one tensor missing": dropped(lambda name: name == PLACE + "gamma"),
    "all tensors of the unet missing": dropped(lambda name: name.startswith("unet.")),
    "no tensors": dropped(lambda name: True),
    "unknown tensor": put(PLACE + "delta", torch.zeros(1)),
    "base weight inside a layer": put(f"unet.{LAYER}.base_layer.weight", torch.zeros(32, 32)),
    "base weight outside": put("unet.conv_in.weight", torch.zeros(16, 4, 3, 3)),
    "NaN": put(PLACE + "A", torch.full(FACTOR, torch.nan)),
    "infinite": put(PLACE + "B", torch.full(FACTOR, -torch.inf)),
    "alpha NaN": put(PLACE + "alpha", torch.tensor([torch.nan])),
    "alpha 1e30": put(PLACE + "alpha", torch.tensor([1e30])),
    "factors 1e30": scaled(PLACE + "A", 1e30),
    "factors 1e6": scaled(PLACE + "B", 1e6),
    "bit flip": spoiled(flip),
    "block of zeros": spoiled(blank),
    "swapped blocks": spoiled(swap),
    "other shape": put(PLACE + "A", torch.zeros(2, 31, 2)),
    "rank mismatch": put(PLACE + "B", torch.zeros(2, 32, 3)),
    "signs of another length": put(PLACE + "signs", torch.zeros(3)),
    "int64": of_dtype(torch.int64),
    "bool": of_dtype(torch.bool),
    "complex": of_dtype(torch.complex64),
    "float8": of_dtype(torch.float8_e4m3fn),
    "float64": of_dtype(torch.float64),
    "text encoder wrong, unet fine": put(
        f"text_encoder.{TEXT_LAYER}.snella_alpha", torch.tensor([-1e8])
    ),
}.items():
    case(_name, "tensor", _build)


# Headers


def with_header(change: Callable[[Header], Any], version: str = "1.0") -> Callable[[], bytes]:
    return lambda: rebuilt(good_bytes(), change, version=version)


def field(path: str, value: Any, version: str = "1.0") -> Callable[[], bytes]:
    """The good file with one header field set; `path` may contain one layer's literal name."""

    def change(header: Header) -> None:
        *parents, last = path.replace(LAYER, "LAYER").split(".")
        node = header
        for part in parents:
            node = node[LAYER if part == "LAYER" else part]
        node[last] = value

    return with_header(change, version)


def with_metadata(change: Callable[[dict[str, str]], Any]) -> Callable[[], bytes]:
    return with_table(lambda table: change(table["__metadata__"]))


def renamed_layer(name: str) -> Callable[[], bytes]:
    def change(header: Header) -> None:
        layers = header["components"]["unet"]["layers"]
        layers[name] = layers.pop(LAYER)

    def move(tensors: Tensors) -> None:
        for old in [old for old in tensors if old.startswith(PLACE)]:
            tensors[old.replace(LAYER, name)] = tensors.pop(old)

    return lambda: rebuilt(good_bytes(), change, move)


def many_layers(header: Header) -> None:
    layers = header["components"]["unet"]["layers"]
    layers |= {f"layer{index}": layers[LAYER] for index in range(4096)}


def newer(header: Header) -> None:
    header |= {"format": "2.0", "writer": "snell_diffusion 3.1.4"}


def future(header: Header) -> None:
    header["requires"] = ["snella", "time-travel"]


for _name, _build in {
    "rank 1e9": field(f"{ROW}.r", 10**9),
    "rank text": field(f"{ROW}.r", "4"),
    "rank -1": field(f"{ROW}.r", -1),
    "unknown field": field("components.unet.novelty", 1),
    "header text not json": with_metadata(lambda texts: texts.update({HEADER_KEY: '{"a": }'})),
    "header text a list": with_metadata(lambda texts: texts.update({HEADER_KEY: "[]"})),
    "header key twice": with_metadata(
        lambda texts: texts.update({HEADER_KEY: '{"format": "1.0", "format": "1.0"}'})
    ),
    "pattern in target_modules": field("components.unet.config.target_modules", HANGS),
    "pattern in exclude_modules": field("components.unet.config.exclude_modules", HANGS),
    "pattern in rank_pattern": field("components.unet.config.rank_pattern", [HANGS]),
    "pattern as a layer": renamed_layer(HANGS),
    "module to import": field("components.unet.config.megatron_core", "antigravity"),
    "digest missing": with_metadata(lambda texts: texts.pop(DIGEST_KEY)),
    "version missing": with_metadata(lambda texts: texts.pop(FORMAT_KEY)),
    "later major version": with_header(newer, "2.0"),
    "unknown feature": with_header(future),
    "4,097 layers": with_header(many_layers),
    "text of 257 characters": field("components.unet.base.class", "x" * 257),
    "level 1.5": field(f"{ROW}.sparsity", 1.5),
    "scale 1e300": field("components.unet.config.scale", 1e300),
}.items():
    case(_name, "header", _build)


# Architectures


def adapter_of(components: dict[str, Any]) -> bytes:
    return adapter_file_bytes(components, metadata={"instance_prompt": "a photo of sks cat"})


def lora() -> bytes:
    names = ("to_q", "to_k", "to_v")
    place = f"unet.{LAYER.rpartition('.')[0]}"
    tensors = {f"{place}.{name}.lora_A.weight": torch.zeros(4, 32) for name in names}
    return save(tensors, {"format": "pt"})


for _name, _build in {
    "flux": lambda: adapter_of({"transformer": adapt(flux_transformer(), target_modules=["to_q"])}),
    "sdxl": lambda: adapter_of({"unet": adapt(sdxl_unet(), target_modules=["to_q"])}),
    "other width": lambda: adapter_of(
        {"unet": adapt(sd15_unet(cross_attention_dim=16), target_modules=["to_k"])}
    ),
    "other class": field("components.text_encoder.base.class", "T5EncoderModel"),
    "lora": lora,
}.items():
    case(_name, "architecture", _build)


# What else an attacker may think of; more than the row promises


def hidden(header: Header) -> None:
    header["components"]["unet"]["layers"][LAYER]["threshold"] = 2.0**100


def behind_a_threshold() -> bytes:
    def change(tensors: Tensors) -> None:
        tensors[PLACE + "A"] *= 1e8
        tensors[PLACE + "threshold"] = torch.tensor(2.0**100)

    return rebuilt(good_bytes(), hidden, change)


def safety_checker() -> bytes:
    def rename(header: Header) -> None:
        header["components"]["safety_checker"] = header["components"].pop("text_encoder")

    def move(tensors: Tensors) -> None:
        for old in [old for old in tensors if old.startswith("text_encoder.")]:
            tensors[old.replace("text_encoder", "safety_checker", 1)] = tensors.pop(old)

    return rebuilt(good_bytes(), rename, move)


def huge_p() -> bytes:
    """A norm whose powers overflow, in the header and in the tensor alike."""

    def change(header: Header) -> None:
        header["components"]["unet"]["config"]["p"] = 1e30

    def tensor(tensors: Tensors) -> None:
        tensors["unet.snella_method"][1] = level(1e30)

    return rebuilt(good_bytes(), change, tensor)


def both_levels(parts: Tensor, stated: float) -> Callable[[], bytes]:
    def change(header: Header) -> None:
        header["components"]["unet"]["layers"][LAYER]["sparsity"] = stated

    def tensor(tensors: Tensors) -> None:
        tensors[PLACE + "sparsity"] = parts

    return lambda: rebuilt(good_bytes(), change, tensor)


def rule_none_with_a_level() -> bytes:
    def change(header: Header) -> None:
        header["components"]["unet"]["config"]["sparsify"] = "none"

    def tensor(tensors: Tensors) -> None:
        tensors["unet.snella_method"][2] = level(4.0)

    return rebuilt(good_bytes(), change, tensor)


def old_float64(name: str, tensor: Tensor) -> Callable[[], bytes]:
    """An F64 tensor under a name of the development version."""

    def build() -> bytes:
        parts = good()
        parts.tensors[name] = tensor
        text = json.dumps(parts.header)
        right = digest(text, parts.tensors)
        return save(parts.tensors, {FORMAT_KEY: "1.0", HEADER_KEY: text, DIGEST_KEY: right})

    return build


for _name, _build in {
    "version of 5,000 digits": with_metadata(
        lambda texts: texts.update({FORMAT_KEY: "1." + "9" * 5000})
    ),
    "number of 5,000 digits": replaced('"dtype": "F32"', '"dtype": ' + "9" * 5000),
    "kept of 400 digits": field(f"{ROW}.kept", 10**400),
    "note of 400 digits": field("metadata.steps", 10**400),
    "more entries kept than there are": field(f"{ROW}.kept", 1025),
    "heads that do not divide the rank": field(f"{ROW}.heads", 3),
    "other rank in the config": field("components.unet.config.r", 1024),
    "control characters in a name": put("unet.\x1b[2J\x07.snella_A", torch.zeros(1)),
    "name that looks alike": put(PLACE + "\u0410", torch.zeros(1)),
    "half a character in a name": replaced(f'"{PLACE}B":', '"unet.\\ud800.snella_A":'),
    "control characters in the writer": field("writer", "\x1b]0;owned\x07" + "x" * 300),
    "layer with control characters": renamed_layer("mid_block\x1b[31m"),
    "safety checker": safety_checker,
    "entries behind a threshold": behind_a_threshold,
    "norm of order 1e30": huge_p,
    "gamma that turns the softmax into one entry, alpha 1e12": with_tensors(
        lambda tensors: tensors.update(
            {PLACE + "gamma": torch.tensor([-1e38]), PLACE + "alpha": torch.tensor([1e12])}
        )
    ),
    "level in parts that are never written": both_levels(torch.tensor([0.5, 0.5, -0.5]), 0.5),
    "level of many numbers": put(PLACE + "sparsity", torch.zeros(1000, 3)),
    "method of one number": put("unet.snella_method", torch.zeros(1)),
    "method that stands for nothing": put("unet.snella_method", torch.full((4, 3), 7.0)),
    "old level NaN": old_float64(PLACE + "sparsity", torch.tensor(torch.nan, dtype=torch.float64)),
    "old level a vector": old_float64(PLACE + "sparsity", torch.zeros(3, dtype=torch.float64)),
    "old method of 1e300": old_float64(
        "unet.snella_method", torch.full((4,), 1e300, dtype=torch.float64)
    ),
    "level with the rule that keeps everything": rule_none_with_a_level,
    "start out of the range of floats": field("components.unet.config.init_scale", 1e300),
    "64 heads in a large layer": with_header(
        lambda header: header["components"]["unet"]["layers"][LAYER].update(
            shape=[10240, 2048], heads=64, r=64
        )
    ),
    "path into another adapter": renamed_layer(f"{LAYER}.base_layer"),
}.items():
    case(_name, "beyond", _build)
