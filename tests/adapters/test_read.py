"""Reading: contents that contradict each other, or are not finite, or were changed."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_diffusion.adapters import read_adapter, read_header
from snell_diffusion.errors import (
    SnellaError,
    SnellaFileError,
    SnellaKeyError,
    SnellaSchemaError,
    SnellaShapeError,
    SnellaValueError,
)
from tests.adapters.files import (
    assemble,
    container,
    header_of,
    level,
    rebuilt,
    scalar,
    split,
    tensors_of,
)

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PLACE = f"unet.{LAYER}.snella_"


def test_file_bytes_and_path_agree(adapter_path: Path) -> None:
    by_path, by_bytes = read_adapter(adapter_path), read_adapter(adapter_path.read_bytes())
    assert by_path.header == by_bytes.header
    assert by_path.digest == by_bytes.digest
    assert all(torch.equal(t, by_bytes.tensors[name]) for name, t in by_path.tensors.items())


def test_the_header_alone_can_be_read(adapter_path: Path) -> None:
    header, head = read_header(adapter_path)
    assert header == read_adapter(adapter_path).header
    assert head.entries.keys() == read_adapter(adapter_path).tensors.keys()


def test_by_layer_groups_all_tensors(adapter_path: Path) -> None:
    file = read_adapter(adapter_path)
    assert set(file.by_layer[f"unet.{LAYER}"]) == {
        f"snella_{name}" for name in ("A", "B", "alpha", "gamma", "beta", "signs", "sparsity")
    }
    assert sum(map(len, file.by_layer.values())) == len(file.tensors)


def test_a_changed_value_breaks_the_digest(adapter_bytes: bytes) -> None:
    damaged = bytearray(adapter_bytes)
    damaged[-3] ^= 1
    with pytest.raises(SnellaFileError, match="tensors were changed after they were written"):
        read_adapter(bytes(damaged))


def test_a_foreign_digest_is_refused(adapter_bytes: bytes) -> None:
    data = assemble(header_of(adapter_bytes), tensors_of(adapter_bytes), digest_text="sha256:0")
    with pytest.raises(SnellaFileError, match=r"'snella.digest': expected 'sha256:0'"):
        read_adapter(data)


def test_random_damage_is_refused_or_harmless(adapter_bytes: bytes) -> None:
    """Flips, cuts and swaps: only our errors escape, and no changed tensor is ever accepted."""
    draw = random.Random(5)
    expected = read_adapter(adapter_bytes)
    accepted = 0
    for _ in range(150):
        data = bytearray(adapter_bytes)
        kind = draw.randrange(4)
        at = draw.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + 16] = bytes(16)
        else:
            header = draw.randrange(8, 8 + int.from_bytes(data[:8], "little"))
            data[header] = draw.randrange(256)
        try:
            came = read_adapter(bytes(data))
        except SnellaError:
            continue
        accepted += 1
        assert all(torch.equal(t, expected.tensors[name]) for name, t in came.tensors.items())
    assert accepted < 15


def change(name: str, value: Tensor | None) -> Any:
    def apply(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[PLACE + name]
        else:
            tensors[PLACE + name] = value

    return apply


BROKEN: dict[str, tuple[Any, type[SnellaError], str]] = {
    "nan": (
        change("beta", torch.tensor([torch.nan])),
        SnellaValueError,
        "beta': expected finite numbers, got 1 NaN",
    ),
    "infinite": (
        change("A", torch.full((2, 32, 2), torch.inf)),
        SnellaValueError,
        "A': expected finite numbers, got 128 NaN or infinite ones of 128",
    ),
    "rank": (
        change("A", torch.zeros(2, 32, 3)),
        SnellaShapeError,
        r"\[2, 32, 2\].*got \[2, 32, 3\]",
    ),
    "heads": (
        change("B", torch.zeros(1, 32, 2)),
        SnellaShapeError,
        r"shape \[2, 32, 2\] .*by the layer table",
    ),
    "level": (change("sparsity", level(0.9)), SnellaValueError, "as in the layer table, got 0.9;"),
    "level gone": (change("sparsity", None), SnellaValueError, "in the layer table, got None"),
    "level vector": (change("sparsity", torch.zeros(4, 3)), SnellaValueError, r"got \[0.0, 0.0"),
    "level long": (change("sparsity", torch.zeros(99, 3)), SnellaShapeError, "at most 256 numb"),
    "level parts": (
        change("sparsity", torch.tensor([0.5, 0.25, 0.0])),
        SnellaValueError,
        r"expected the 3 parts of one number, high part first, got \[0.5, 0.25, 0.0\]",
    ),
    "level half": (
        change("sparsity", torch.zeros(3, dtype=torch.float16)),
        SnellaValueError,
        "expected F32 with a last axis of 3",
    ),
    "threshold": (
        change("threshold", scalar(0.5)),
        SnellaValueError,
        "threshold': expected None as in the layer table, got 0.5",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_contradict_the_header_are_refused(name: str, adapter_bytes: bytes) -> None:
    apply, error, message = BROKEN[name]
    with pytest.raises(error, match=message):
        read_adapter(rebuilt(adapter_bytes, tensors=apply))


@pytest.mark.parametrize(
    "name",
    [
        "unet.conv_in.weight",
        f"unet.{LAYER}.base_layer.weight",
        f"unet.{LAYER}.weight",
        f"{LAYER}.snella_A",
        f"vae.{LAYER}.snella_A",
        "snella_method",
    ],
)
def test_a_file_can_set_nothing_outside_its_layer_table(name: str, adapter_bytes: bytes) -> None:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(2)

    with pytest.raises(
        SnellaKeyError, match=rf"only tensors of the layers in its table, got {name}, and"
    ):
        read_adapter(rebuilt(adapter_bytes, tensors=apply))


def test_a_name_that_has_no_bytes_is_refused(adapter_bytes: bytes) -> None:
    """JSON can spell half a character; a digest cannot be taken of it."""
    table, body = split(adapter_bytes)
    where = [len(body), len(body) + 4]
    table[f"{PLACE}\ud800"] = {"dtype": "F32", "shape": [1], "data_offsets": where}
    with pytest.raises(SnellaKeyError, match=r"snella_\\ud800, and an adapter can set nothing"):
        read_adapter(container(table, body + bytes(4)))


def test_a_layer_without_tensors_is_refused(adapter_bytes: bytes) -> None:
    def apply(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(PLACE)]:
            del tensors[name]

    with pytest.raises(SnellaKeyError, match=rf"got none for unet.{LAYER}; the file is incompl"):
        read_adapter(rebuilt(adapter_bytes, tensors=apply))


def test_settings_in_header_and_tensor_must_agree(adapter_bytes: bytes) -> None:
    def apply(header: dict[str, Any]) -> None:
        header["components"]["unet"]["config"]["sparsify"] = "mask"

    message = "setting sparsify: expected 'mask' as in the header, got 'squared'"
    with pytest.raises(SnellaSchemaError, match=message):
        read_adapter(rebuilt(adapter_bytes, apply))


@pytest.mark.parametrize("field, value", [("r", 1024), ("heads", 1), ("r", None)])
def test_a_config_cannot_ask_for_other_factors_than_the_table(
    field: str, value: int | None, adapter_bytes: bytes
) -> None:
    def apply(header: dict[str, Any]) -> None:
        header["components"]["text_encoder"]["config"][field] = value

    with pytest.raises(
        SnellaSchemaError, match=rf"config.{field}': expected . as in layer .* got {value}"
    ):
        read_adapter(rebuilt(adapter_bytes, apply))


def test_state_dicts_hold_tensors_only(adapter_bytes: bytes) -> None:
    tensors: dict[str, Any] = dict(tensors_of(adapter_bytes))
    with pytest.raises(SnellaFileError, match="'x': expected a tensor under a name, got a list"):
        read_adapter({**tensors, "x": [1]})
    with pytest.raises(
        SnellaFileError, match=r"'x': expected dense F32, F16, BF16, U8, I64 .*int32, tor"
    ):
        read_adapter({**tensors, "x": torch.zeros(1, dtype=torch.int32)})
    with pytest.raises(SnellaFileError, match=r"got torch.float32, torch.strided, on meta"):
        read_adapter({**tensors, "x": torch.zeros(1, device="meta")})
    with pytest.raises(SnellaFileError, match=r"got torch.float32, torch.sparse_coo, on cpu"):
        read_adapter({**tensors, "x": torch.zeros(2, 2).to_sparse()})
    with pytest.raises(SnellaFileError, match=r"'snella.header': expected a text, got a int"):
        read_adapter({**tensors, "snella.header": 3})


def test_a_state_dict_is_copied(adapter_bytes: bytes) -> None:
    tensors = tensors_of(adapter_bytes)
    file = read_adapter(tensors)
    tensors[PLACE + "A"].zero_()
    assert bool(file.tensors[PLACE + "A"].any())
