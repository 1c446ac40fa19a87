import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snell_diffusion.core import (
    KERNELS,
    LIVE_AT_ZERO,
    RULES,
    dense,
    distance_kernel,
    linear_kernel,
    mix,
    sparsify,
    update,
)

SIGNS = torch.tensor([0.1, -0.1])
SCALARS = {"alpha": 0.7, "gamma": 0.35, "beta": -0.02}


def factors(I: int = 9, O: int = 7, q: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, I, q, generator=rng), torch.randn(2, O, q, generator=rng)


def scalars(kernel: str) -> dict[str, float]:
    return SCALARS if kernel == "mixed" else {}


def test_every_kernel_is_its_formula_then_sparsified() -> None:
    A, B = factors()
    table = {
        "mixed": mix(distance_kernel(A, B, SIGNS, 2.0), **SCALARS),
        "distance": distance_kernel(A, B, SIGNS, 2.0),
        "linear": linear_kernel(A, B, SIGNS),
    }
    assert set(table) == set(KERNELS)
    for kernel, w in table.items():
        assert torch.equal(dense(A, B, SIGNS, **scalars(kernel), kernel=kernel), w)
        for rule in set(RULES) - {"none"}:
            options = {"kernel": kernel, "rule": rule, "sparsity": 0.4}
            got = update(A, B, SIGNS, **scalars(kernel), **options)
            assert torch.equal(got, sparsify(w, 0.4, rule)), (kernel, rule)


def test_the_norm_reaches_the_distances() -> None:
    A, B = factors()
    for p in (1.0, 3.0):
        got = update(A, B, SIGNS, kernel="distance", rule="none", p=p)
        assert torch.equal(got, distance_kernel(A, B, SIGNS, p))
        assert torch.equal(dense(A, B, SIGNS, **SCALARS, p=p), mix(got, **SCALARS))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", LIVE_AT_ZERO)
def test_a_reference_gives_an_exact_zero_start_that_can_learn(kernel: str, rule: str) -> None:
    A, B = (t.requires_grad_() for t in factors())
    level = 0.0 if rule == "none" else 0.8
    start = dense(A, B, SIGNS, **scalars(kernel), kernel=kernel).detach()
    options = {"kernel": kernel, "rule": rule, "sparsity": level}
    delta = update(A, B, SIGNS, **scalars(kernel), **options, reference=start)
    assert not delta.any()
    rebuilt = update(A, B, SIGNS, **scalars(kernel), **options, reference=lambda: start)
    assert torch.equal(rebuilt, delta)
    G = torch.randn(9, 7, generator=torch.Generator().manual_seed(3))
    gA, gB = torch.autograd.grad(delta, [A, B], G)
    assert bool(gA.any(-1).all())
    assert bool(gB.any(-1).all())
    with torch.no_grad():
        moved = update(A - gA, B - gB, SIGNS, **scalars(kernel), **options, reference=start)
    assert (moved * G).sum() < 0  # downhill


def test_equal_heads_of_opposite_sign_cancel_exactly() -> None:
    for q in (4, 16):
        A, B = factors(q=q)
        A[1], B[1] = A[0], B[0]
        assert not update(A, B, SIGNS, kernel="distance", rule="none").any()


def test_runs_in_float32_below_and_float64_above() -> None:
    A, B = factors()
    want = update(A, B, SIGNS, **SCALARS, sparsity=0.4)
    low = [torch.tensor([v]).bfloat16() for v in SCALARS.values()]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(update(A, B, SIGNS, **SCALARS, sparsity=0.4), want)
        got = update(A.bfloat16(), B.bfloat16(), SIGNS.bfloat16(), *low, sparsity=0.4)
    assert got.dtype == want.dtype == torch.float32
    wide = update(A.double(), B.double(), SIGNS.double(), **SCALARS, sparsity=0.4)
    assert wide.dtype == torch.float64


def test_deterministic() -> None:
    A, B = factors(40, 30, 16)
    first, second = (update(A, B, SIGNS, **SCALARS, sparsity=0.5) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_read_back_from_the_device() -> None:
    """A number read from a GPU makes the program wait for it; fake tensors refuse such reads."""
    with FakeTensorMode():
        A, B = torch.empty(2, 9, 16, requires_grad=True), torch.empty(2, 7, 16)
        mixed = [torch.empty(1, requires_grad=True) for _ in range(3)]
        for rule in RULES:
            level = 0.0 if rule == "none" else 0.4
            delta = update(A, B, torch.empty(2), *mixed, sparsity=level, rule=rule)
            delta.sum().backward()
    assert delta.shape == (9, 7)
    assert A.grad is not None


def test_errors_name_what_came() -> None:
    A, B = factors()
    with pytest.raises(ValueError, match="kernel 'gauss' is unknown; known: mixed, distance, lin"):
        update(A, B, SIGNS, kernel="gauss")
    with pytest.raises(ValueError, match="kernel 'mixed' needs gamma, beta"):
        update(A, B, SIGNS, alpha=1.0)
    with pytest.raises(ValueError, match="kernel 'distance' takes no alpha"):
        update(A, B, SIGNS, alpha=1.0, kernel="distance")
    with pytest.raises(ValueError, match="rule 'hard' is unknown"):
        update(A, B, SIGNS, kernel="linear", rule="hard")
