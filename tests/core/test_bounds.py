"""The bound on an update's size: never below the update, useful where updates are ordinary."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_diffusion.core import KERNELS, RULES, update
from snell_diffusion.core.bounds import LARGEST_POINT, update_bound

Factors = tuple[Tensor, Tensor, Tensor]


def factors(size: float = 1.0, offset: float = 0.0, heads: int = 4, seed: int = 0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = size * torch.randn(heads, 30, 8, generator=draw) + offset
    B = size * torch.randn(heads, 50, 8, generator=draw) + offset
    return A, B, 0.1 * (1 - 2.0 * (torch.arange(heads) % 2))


def scalars(kernel: str, alpha: float = 1.5, beta: float = -0.2) -> dict[str, Tensor]:
    return (
        {"alpha": torch.tensor([alpha]), "beta": torch.tensor([beta])} if kernel == "mixed" else {}
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_update_is_larger_than_its_bound(kernel: str, rule: str) -> None:
    gamma: dict[str, Any] = {"gamma": torch.tensor([0.3])} if kernel == "mixed" else {}
    for size, offset, p, seed in (
        (1.0, 0.0, 2, 0),
        (1.0, 0.0, 1, 1),
        (30.0, 5.0, 2, 2),
        (1e-3, 9, 2, 3),
    ):
        points, more = factors(size, offset, seed=seed), scalars(kernel)
        bound = update_bound(*points, **more, kernel=kernel, p=p, rule=rule)
        for level in (None, 0.0, 0.7) if rule != "none" else (None,):
            limit = torch.tensor(0.0) if level is None else None
            delta = update(
                *points,
                **more,
                **gamma,
                sparsity=level or 0.0,
                kernel=kernel,
                p=p,
                rule=rule,
                threshold=limit,
            )
            assert float(delta.norm()) <= bound < math.inf


@pytest.mark.parametrize("part", ["alpha", "beta"])
def test_it_is_tight_where_one_scalar_is_all_there_is(part: str) -> None:
    A, B, signs = factors(0.0)
    more = scalars("mixed", **{"alpha": 0.0, "beta": 0.0, part: 3.0})
    bound = update_bound(A, B, signs, **more, kernel="mixed", p=2, rule="mask")
    largest = {"alpha": 3 * math.sqrt(30), "beta": 3 * math.sqrt(30 * 50)}[part]  # one-hot rows
    assert bound == pytest.approx(largest, rel=0.02)


def test_one_point_far_out_is_seen() -> None:
    A, B, signs = factors(1e-3)
    A[0, 7] = 1e3
    bound = update_bound(A, B, signs, kernel="distance", p=2, rule="squared")
    delta = update(A, B, signs, kernel="distance", threshold=torch.tensor(0.0))
    assert float(delta.norm()) <= bound < 1.5 * float(delta.norm())


@pytest.mark.parametrize("p", [1.5, 3.0, 1e6, 0.5, math.inf])
def test_other_norms_have_no_bound(p: float) -> None:
    assert update_bound(*factors(), kernel="distance", p=p, rule="mask") == math.inf


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [10 * LARGEST_POINT, 1e30, math.inf, math.nan])
def test_what_could_overflow_has_no_bound(kernel: str, size: float) -> None:
    """Whatever the coefficients: an evaluation would square the points first."""
    A, B, signs = factors()
    A[1, 3, 2] = size
    more = scalars(kernel)
    assert update_bound(A, B, 1e-30 * signs, **more, kernel=kernel, p=2, rule="mask") == math.inf


@pytest.mark.parametrize("alpha, beta", [(math.inf, 0.0), (0.0, math.nan), (1e300, 1e300)])
def test_scalars_without_bound(alpha: float, beta: float) -> None:
    more = {"alpha": torch.tensor([alpha]), "beta": torch.tensor([beta])}
    assert update_bound(*factors(), **more, kernel="mixed", p=2, rule="squared") == math.inf


def test_16_bit_factors_are_bounded_in_full_precision() -> None:
    A, B, signs = factors(100.0)
    low = update_bound(A.half(), B.half(), signs, kernel="distance", p=2, rule="squared")
    high = update_bound(A, B, signs, kernel="distance", p=2, rule="squared")
    assert low == pytest.approx(high, rel=1e-2)


@pytest.mark.parametrize("rule, factor", [("squared", 2**0.5), ("mask", 2**0.5)])
def test_it_is_reached_but_for_half_of_the_points(rule: str, factor: float) -> None:
    """Distances are 0 and 2 in turn; the bound takes all for 2."""
    A, B = torch.zeros(1, 30, 8), torch.zeros(1, 50, 8)
    A[..., 0], B[:, ::2, 0], B[:, 1::2, 0] = 1.0, 1.0, -1.0
    signs = torch.tensor([0.1])
    delta = update(A, B, signs, kernel="distance", rule=rule, threshold=torch.tensor(0.0))
    bound = update_bound(A, B, signs, kernel="distance", p=2, rule=rule)
    assert bound == pytest.approx(factor * float(delta.norm()), rel=0.02)
