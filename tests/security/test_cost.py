"""What it costs to refuse a file of up to 100 MB: at most 2 s of CPU and 300 MiB of memory.

Each file is the worst we know for one part of the reader. The child has 4 GiB of address space.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from snell_diffusion.adapters.limits import (
    MAX_FEATURES,
    MAX_FIELDS,
    MAX_HEADER_BYTES,
    MAX_HEADER_VALUES,
    MAX_LAYERS,
    MAX_TENSORS,
)
from tests.adapters.files import assemble, container
from tests.rows import RowRecord
from tests.security.corpus import LAYER, PLACE, Header, good, good_bytes
from tests.security.forked import MIB, run_forked
from tests.tiny_models import pipeline

CPU_SECONDS, EXTRA_BYTES = 2.0, 300 * MIB
LARGEST = 100_000_000


def unet_alone(layers: dict[str, Any], **config: Any) -> Header:
    """The good header with these layers of the UNet and nothing else."""
    header = good().header
    unet = header["components"]["unet"]
    unet |= {"layers": layers, "config": {**unet["config"], **config}}
    header["components"] = {"unet": unet}
    return header


def row_of(**changes: Any) -> dict[str, Any]:
    return {**good().header["components"]["unet"]["layers"][LAYER], **changes}


def layer_tensors() -> dict[str, Tensor]:
    """The tensors of one layer of the good file by their short names."""
    tensors = good().tensors
    return {
        name.removeprefix(PLACE): tensor
        for name, tensor in tensors.items()
        if name.startswith(PLACE)
    }


def one_layer(
    shape: list[int], r: int, spoil: Callable[[dict[str, Tensor]], Any], digest: str | None = None
) -> bytes:
    """A file of one layer, 2 heads."""
    out_features, in_features = shape
    tensors = {PLACE + name: tensor for name, tensor in layer_tensors().items()}
    tensors |= {
        "unet.snella_method": good().tensors["unet.snella_method"],
        PLACE + "A": torch.full((2, in_features, r // 2), 0.5),
        PLACE + "B": torch.zeros(2, out_features, r // 2),
    }
    spoil(tensors)
    header = unet_alone({LAYER: row_of(shape=shape, r=r, kept=0)}, r=r)
    return assemble(header, tensors, digest_text=digest)


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


def last_is_nan(tensors: dict[str, Tensor]) -> None:
    tensors[PLACE + "A"][-1, -1, -1] = torch.nan


def many_layers() -> bytes:
    """As many layers and tensors as the limits allow, all of them whole."""
    shorts = {name: layer_tensors()[name] for name in ("A", "B", "sparsity")}
    paths = [f"block.{index}.to_q" for index in range(MAX_LAYERS)]
    tensors = {f"unet.{p}.snella_{name}": shorts[name] for p in paths for name in shorts}
    tensors["unet.snella_method"] = good().tensors["unet.snella_method"]
    return assemble(unet_alone({path: row_of() for path in paths}), tensors)


def many_strangers() -> bytes:
    parts = good()
    end = len(parts.body)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    count = MAX_TENSORS - len(parts.tensors)
    table = {f"unet.{'x' * 140}{index}.snella_A": empty for index in range(count)}
    return container({**parts.table, **table}, parts.body)


def a_million_tensors() -> bytes:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return container("{" + ",".join(f'"t{index}":{empty}' for index in range(1_300_000)) + "}")


def as_many_values_as_allowed() -> bytes:
    """Nested tables and lists up to the limits on bytes and values."""
    text = '{"a":[' + ",".join(['{"b":[[]]}'] * (MAX_HEADER_VALUES - 1)) + "]}"
    return container(text.ljust(MAX_HEADER_BYTES))


def unknown_fields() -> bytes:
    """A later version with as many unknown fields as allowed, and a digest that does not fit."""
    parts = good()
    parts.header["format"] = "1.9"
    for index in range(MAX_FIELDS - 500):
        parts.header[f"field{index}"] = index
    return assemble(parts.header, parts.tensors, "1.9", digest_text="sha256:0")


def long_texts() -> bytes:
    """Names and values of megabytes, which a message must not repeat."""
    parts = good()
    parts.table["__metadata__"]["snella.format"] = "9" * 1_000_000
    parts.table["\x1b" * 300_000] = {"dtype": "F" * 500_000, "shape": [1], "data_offsets": [0, 4]}
    return container(parts.table, parts.body)


FILES: dict[str, Callable[[], bytes]] = {
    "92 MB, wrong digest": lambda: one_layer([8, MAX_FEATURES], 22, nothing, "sha256:0"),
    "92 MB, the last value NaN": lambda: one_layer([8, MAX_FEATURES], 22, last_is_nan),
    "a layer of 2^20 x 2^20": lambda: one_layer([MAX_FEATURES, MAX_FEATURES], 2, nothing),
    "67 MB of rank 1,024": lambda: one_layer([8192, 8192], 1024, nothing),
    "4,096 layers": many_layers,
    "16,384 tensors of no layer": many_strangers,
    "header of a million tensors": a_million_tensors,
    "header of 131,072 values": as_many_values_as_allowed,
    "header nested a million deep": lambda: container('{"a":[' * 600_000),
    "65,000 unknown fields": unknown_fields,
    "texts of megabytes": long_texts,
}

# The slowest and the largest: their figures are published.
WORST = ("header of 131,072 values", "92 MB, the last value NaN")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    good_bytes()
    return pipeline()


def load(pipe: StableDiffusionPipeline, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a later version
        return str(pipe.load_snella_weights(path))


@pytest.mark.row("A4")
@pytest.mark.parametrize("name", FILES)
def test_refusing_is_cheap(
    name: str, pipe: StableDiffusionPipeline, tmp_path: Path, row: RowRecord
) -> None:
    path = tmp_path / "big.safetensors"
    path.write_bytes(FILES[name]())
    assert path.stat().st_size <= LARGEST
    outcome = run_forked(lambda: load(pipe, path))
    assert "SnellaError" in outcome.kinds, outcome
    assert len(outcome.text) < 3000
    if name in WORST:
        row.figure(f"{name}: {outcome.seconds:.2f} s, {outcome.extra_bytes / MIB:.0f} MiB")
    assert outcome.seconds <= CPU_SECONDS
    assert outcome.extra_bytes <= EXTRA_BYTES


def test_the_measurement_sees_time_and_memory() -> None:
    def work() -> int:
        taken = bytearray(400 * MIB)
        taken[::4096] = b"x" * len(taken[::4096])
        return sum(range(5_000_000))

    outcome = run_forked(work)
    assert outcome.extra_bytes > EXTRA_BYTES
    assert 0.02 < outcome.seconds < 20
    assert run_forked(lambda: bytearray(5000 * MIB)).error == "MemoryError"
    assert json.dumps(run_forked(lambda: None).value) == "null"
