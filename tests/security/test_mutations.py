"""Seeded damage to a file's bytes: refused, or the content is bit-equal to the original.

`--mutations N` tries N files instead of 4,000; the full tier tries 100,000.
"""

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snell_diffusion import SnellaError, read_adapter
from snell_diffusion.adapters import AdapterFile
from tests.adapters.files import assemble, header_of, split, tensors_of
from tests.rows import RowRecord
from tests.security.corpus import good_bytes

PER_CHANGE, FULL = 4_000, 100_000
Damage = Callable[[random.Random, bytearray], bytes | bytearray]


def flip(draw: random.Random, data: bytearray) -> bytearray:
    """1 to 3 single bits."""
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def cut(draw: random.Random, data: bytearray) -> bytearray:
    """The end missing."""
    return data[: draw.randrange(len(data))]


def extend(draw: random.Random, data: bytearray) -> bytearray:
    """1 to 64 bytes more."""
    return data + draw.randbytes(draw.randint(1, 64))


def zero(draw: random.Random, data: bytearray) -> bytearray:
    """A block of 1 to 512 bytes blanked, as a lost disk block leaves it."""
    start, size = draw.randrange(len(data)), draw.randint(1, 512)
    data[start : start + size] = bytes(len(data[start : start + size]))
    return data


def swap(draw: random.Random, data: bytearray) -> bytearray:
    """Two blocks of equal size exchanged."""
    size = draw.randint(1, 256)
    first, second = sorted(draw.sample(range(0, len(data) - size, size), 2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    return data


def duplicate(draw: random.Random, data: bytearray) -> bytearray:
    """A block there twice, either inserted or over what followed it."""
    start, size = draw.randrange(len(data)), draw.randint(1, 256)
    block = data[start : start + size]
    end = start + len(block)
    return data[:end] + block + data[end if draw.random() < 0.5 else end + len(block) :]


def header(draw: random.Random, data: bytearray) -> bytearray:
    """1 to 4 characters of the header replaced by others that JSON is made of."""
    length = int.from_bytes(data[:8], "little")
    for _ in range(draw.randint(1, 4)):
        data[8 + draw.randrange(length)] = draw.choice(b'{}[]",:.-+eE0123456789truefalsn \\')
    return data


def length(draw: random.Random, data: bytearray) -> bytearray:
    """Another header length, near the right one or anywhere."""
    right = int.from_bytes(data[:8], "little")
    near = max(0, right + draw.randint(-64, 64))
    data[:8] = (near if draw.random() < 0.5 else draw.getrandbits(64)).to_bytes(8, "little")
    return data


KINDS: tuple[Damage, ...] = (flip, cut, extend, zero, swap, duplicate, header, length)


@cache
def original() -> AdapterFile:
    return read_adapter(good_bytes())


def outcome(data: bytes) -> str:
    """What becomes of a file; an assertion fails if other content than the original's comes in."""
    if data == good_bytes():
        return "unchanged"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged version number may be a later one
            came = read_adapter(data)
    except SnellaError:
        return "refused"
    assert came.header == original().header
    assert came.tensors.keys() == original().tensors.keys()
    for name, tensor in came.tensors.items():
        assert tensor.dtype == original().tensors[name].dtype
        assert torch.equal(tensor, original().tensors[name]), name
    return "equal"


def try_mutations(count: int, seed: int) -> Counter[str]:
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        came = outcome(bytes(kind(draw, bytearray(good_bytes()))))
        outcomes[came] += 1
        outcomes[f"{kind.__name__}: {came}"] += 1
    return outcomes


def tell(outcomes: Counter[str], row: RowRecord) -> None:
    row.cases(outcomes["refused"] + outcomes["equal"] + outcomes["unchanged"])
    row.figure(
        f"{outcomes['refused']:,} refused, {outcomes['equal'] + outcomes['unchanged']:,} accepted "
        "with equal content, 0 accepted damage"
    )


@pytest.mark.row("A2")
def test_no_damage_goes_unnoticed(request: pytest.FixtureRequest, row: RowRecord) -> None:
    count = request.config.getoption("--mutations", None) or PER_CHANGE
    outcomes = try_mutations(count, seed=1)
    tell(outcomes, row)
    assert outcomes["refused"] > 0.9 * count
    for kind in KINDS:
        assert outcomes[f"{kind.__name__}: refused"] > 0.7 * count / len(KINDS)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.row("A2")
def test_no_damage_goes_unnoticed_in_a_hundred_thousand(row: RowRecord) -> None:
    outcomes = try_mutations(FULL, seed=2)
    tell(outcomes, row)
    assert outcomes["refused"] > 0.9 * FULL


# The header's schema: any JSON in any place, with a right digest

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["", "1.0", "2.0", "snella", "linear", "\x1b[2J", "a" * 300, 10**30, -1]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested tables and lists, as keys from the root."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = [path]
    for key, value in items:
        inner = (*path, key)
        found += places(value, inner) if isinstance(value, (dict, list)) else [inner]
    return found


PLACES = places(header_of(good_bytes()))[1:]


def put(node: Any, path: tuple[Any, ...], value: Any, beside: bool) -> None:
    for key in path[:-1]:
        node = node[key]
    if beside and isinstance(node, dict):
        node[f"{path[-1]}x"] = value
    else:
        node[path[-1]] = value


def read_or_refuse(data: bytes) -> AdapterFile | str:
    """What is read, or why not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_adapter(data)
        except SnellaError as error:
            return str(error)


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.sampled_from(PLACES), JSON, st.booleans(), st.sampled_from(["1.0", "1.7"]))
def test_any_json_in_any_field_is_refused_or_fits_the_schema(
    path: tuple[Any, ...], value: Any, beside: bool, version: str
) -> None:
    changed = header_of(good_bytes())
    changed["format"] = version
    put(changed, path, value, beside)
    came = read_or_refuse(assemble(changed, tensors_of(good_bytes()), version))
    if isinstance(came, str):
        assert came.isprintable()
        assert len(came) < 1500
        return
    json.loads(came.header.to_json())  # what is accepted can be written again
    for name, tensor in came.tensors.items():
        assert torch.equal(tensor, original().tensors[name])


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(JSON, st.booleans())
def test_any_json_as_a_container_is_refused(value: Any, with_tensor: bool) -> None:
    table, body = split(good_bytes())
    if with_tensor and isinstance(value, dict):
        value = {**value, "__metadata__": table["__metadata__"]}
    text = json.dumps(value).encode()
    with pytest.raises(SnellaError):
        read_adapter(len(text).to_bytes(8, "little") + text + body)
