"""Doubles in float32 files: exact, or refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snell_diffusion.adapters.doubles import join_doubles, split_doubles
from snell_diffusion.errors import SnellaValueError

MAGNITUDES = st.floats(min_value=1e-28, max_value=3e38)


def there_and_back(number: float) -> float:
    parts = split_doubles(torch.tensor(number, dtype=torch.float64), "x")
    assert parts.shape == (3,)
    assert parts.dtype == torch.float32
    return float(join_doubles(parts, "x"))


@given(MAGNITUDES, st.sampled_from([1.0, -1.0]))
def test_every_number_of_usual_size_comes_back_exactly(size: float, sign: float) -> None:
    assert there_and_back(sign * size) == sign * size


@pytest.mark.parametrize(
    "number", [0.0, 1.0, 0.1, 1 / 3, 1 - 2**-53, 2**-40, 1e-17, math.pi, -4.0, 12345.678]
)
def test_numbers_that_levels_and_settings_have(number: float) -> None:
    assert there_and_back(number) == number


def test_parts_are_largest_first_and_keep_the_shape() -> None:
    numbers = torch.tensor([[0.1, 2.0], [1 / 3, 0.0]], dtype=torch.float64)
    parts = split_doubles(numbers, "x")
    assert parts.shape == (2, 2, 3)
    assert torch.equal(parts[..., 0], numbers.float())
    assert torch.equal(join_doubles(parts, "x"), numbers)


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300, 1e-40, 0.1 * 2**-110])
def test_numbers_without_parts_are_refused(number: float) -> None:
    with pytest.raises(SnellaValueError, match="x: expected 0 or numbers of magnitude 1e-28 to"):
        split_doubles(torch.tensor(number, dtype=torch.float64), "x")


@pytest.mark.parametrize("parts", [[0.5, 0.5, 0.0], [0.0, 0.0, 0.5], [1.0, 2**-24, -(2**-24)]])
def test_parts_that_are_never_written_are_refused(parts: list[float]) -> None:
    with pytest.raises(SnellaValueError, match="expected the 3 parts of one number, high part"):
        join_doubles(torch.tensor(parts), "x")


@pytest.mark.parametrize("parts", [torch.zeros(()), torch.zeros(2), torch.zeros(3).half()])
def test_other_shapes_and_dtypes_are_refused(parts: torch.Tensor) -> None:
    with pytest.raises(SnellaValueError, match="expected F32 with a last axis of 3"):
        join_doubles(parts, "x")
