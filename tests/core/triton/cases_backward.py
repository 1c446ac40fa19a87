"""The backward passes against autograd of the plain formulas. `test_passes.py` runs this file."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from snell_diffusion.core import LIVE_AT_ZERO, RULES
from snell_diffusion.core.triton import launch, ops
from tests.core.triton.layers import DEVICE, KERNELS, Layers, cut_at, layers

SCALE = 0.7
LEVEL = 0.7003  # no matrix here has an entry right at this quantile, on which rounding would decide


def gradient(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@dataclass
class Wanted:
    """One layer's gradients of A, B and mixers by autograd in float64, and what to allow for."""

    exact: list[Tensor]
    terms: float  # sum of magnitudes behind a scalar's gradient, which may cancel


def wanted(given: Layers, cut: Tensor | None, dW: Tensor, rule: str) -> list[Wanted]:
    found = []
    for g in range(len(dW)):
        t = torch.zeros(()) if cut is None else cut[g]
        delta, leaves = given.delta(g, t, rule)
        G = SCALE * dW[g].double()
        exact = list(torch.autograd.grad(delta, leaves, G, retain_graph=True))
        scalars = torch.autograd.grad(delta, leaves, G.abs())[2:]
        found.append(Wanted(exact, max((float(x.abs()) for x in scalars), default=0.0)))
    return found


def assert_same(got: ops.Gradients, want: list[Wanted], rtol: float = 1e-5) -> None:
    """Each tensor within rtol of its norm, each scalar within rtol of its terms."""
    for g, layer in enumerate(want):
        for name, exact in zip(ops.Gradients._fields, layer.exact, strict=False):
            off = float((getattr(got, name)[g].double() - exact).norm())
            size = float(exact.norm()) if name in ("A", "B") else layer.terms
            assert off <= rtol * size, (name, g, off / size)
    assert [x is not None for x in got] == [n < len(want[0].exact) for n in range(5)]


def run(given: Layers, dW: Tensor, rule: str, level: float = LEVEL):
    """Thresholds and gradients of the fused path."""
    group = given.group()
    cut = cut_at(group, level, rule)
    return cut and cut[0], ops.backward(group, cut, SCALE, list(dW), rule)


@pytest.mark.parametrize(
    "rule, kernel",
    [*((rule, "mixed") for rule in RULES), ("squared", "distance"), ("none", "distance")],
)
def test_gradients_of_every_rule(rule, kernel):
    given, dW = layers(2, 2, 37, 53, 16, kernel), gradient(2, 53, 37)
    t, got = run(given, dW, rule)
    assert_same(got, wanted(given, t, dW, rule))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "G, H, I, O, q", [(1, 1, 1, 1, 1), (1, 2, 40, 70, 3), (1, 3, 20, 33, 33), (1, 8, 20, 33, 8)]
)
def test_gradients_of_odd_shapes(kernel, G, H, I, O, q):
    given, dW = layers(G, H, I, O, q, kernel), gradient(G, O, I)
    rule = "mask" if I * O > 1 else "none"  # a single entry is dropped
    t, got = run(given, dW, rule)
    assert_same(got, wanted(given, t, dW, rule))


@pytest.mark.parametrize("value", [1e-3, 1e-9, -2.0])
def test_gradients_at_a_small_temperature(value):
    given, dW = layers(1, 2, 20, 70, 8, "mixed"), gradient(1, 70, 20)
    alpha, gamma, beta = given.mixers
    given.mixers = alpha, torch.full_like(gamma, value), beta
    t, got = run(given, dW, "mask")
    assert_same(got, wanted(given, t, dW, "mask"), rtol=2e-3)
    assert got.gamma.abs() > 0  # passes the bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_read_as_it_is(dtype):
    given, low = layers(2, 2, 37, 53, 16, "mixed"), gradient(2, 53, 37).to(dtype)
    _, got = run(given, low, "squared")
    _, want = run(given, low.float(), "squared")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("q", [4, 16])
def test_coincident_points_have_no_gradient(q):
    given = layers(1, 1, 37, 53, q, "distance")
    given.A[0, 0] = given.B[0, 0, :37]
    only = torch.eye(53, 37, device=DEVICE)[None]
    _, got = run(given, only, "none")
    assert not got.A.any()
    assert not got.B.any()
    dW = gradient(1, 53, 37)
    t, got = run(given, dW, "none")
    assert_same(got, wanted(given, t, dW, "none"))


@pytest.mark.parametrize("q", [4, 16])
def test_nearly_coincident_points(q):
    given, dW = layers(1, 1, 37, 53, q, "distance"), gradient(1, 53, 37)
    given.A[0, 0, 3] = given.B[0, 0, 7] + 0.01
    t, got = run(given, dW, "none")
    assert_same(got, wanted(given, t, dW, "none"))


@pytest.mark.parametrize("rule", RULES)
def test_a_matrix_of_zeros_lives_by_the_rules_that_say_so(rule):
    given = layers(1, 2, 20, 30, 16, "distance")
    given.A[:, 1], given.B[:, 1] = given.A[:, 0], given.B[:, 0]
    dW = gradient(1, 30, 20)
    t, got = run(given, dW, rule)
    assert bool(got.A.any()) == bool(got.B.any()) == (rule in LIVE_AT_ZERO)
    assert_same(got, wanted(given, t, dW, rule))


def test_results_repeat_alone_or_in_a_group(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS_A_PROCESSOR", 0)  # parts depend on the group's size
    given, dW = layers(2, 2, 70, 40, 16, "mixed"), gradient(2, 40, 70)
    _, first = run(given, dW, "squared")
    _, again = run(given, dW, "squared")
    one = [t[1:] for t in (given.A, given.B, given.signs, *given.mixers)]
    _, alone = run(Layers(*one[:3], tuple(one[3:])), dW[1:], "squared")
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:], c)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_in_parts_add_up(kernel, monkeypatch):
    given, dW = layers(1, 2, 80, 70, 16, kernel), gradient(1, 70, 80)
    monkeypatch.setattr(launch, "PROGRAMS_A_PROCESSOR", 100)
    assert given.group().strips("I")[1] == given.group().strips("O")[1] == 2
    t, got = run(given, dW, "squared")
    assert_same(got, wanted(given, t, dW, "squared"))


def test_each_layer_has_its_scale():
    given, dW = layers(2, 2, 20, 30, 16, "mixed"), gradient(2, 30, 20)
    group = given.group()
    cut = cut_at(group, LEVEL, "squared")
    both = ops.backward(group, cut, torch.tensor([2.0, 0.5], device=DEVICE), list(dW))
    one = ops.backward(group, cut, 1.0, list(dW))
    for a, b in zip(both, one, strict=True):
        assert torch.equal(a[0], 2 * b[0])
        assert torch.equal(a[1], b[1] / 2)


def test_nan_reaches_every_gradient_it_belongs_to():
    given, dW = layers(1, 2, 20, 30, 16, "mixed"), gradient(1, 30, 20)
    dW[0, 4, 6] = torch.nan
    _, got = run(given, dW, "none")
    assert got.A[0, :, 6].isnan().all()
    assert int(got.A.isnan().any(-1).sum()) == 2  # of each head the one input
    assert got.B.isnan().all()  # through the softmax of that input
    assert all(x.isnan().all() for x in got[2:])
