"""Updates in blocks of columns against the plain formula."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from snell_diffusion.core import (
    KERNELS,
    RULES,
    KernelUpdate,
    ScaledSum,
    WholeUpdate,
    blocks,
    kernel_update,
    merged_linear,
    scratch,
    sparsify,
    threshold,
    update,
)

I, O, H, q = 37, 23, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(blocks, "ALIGNMENT", 1)
    monkeypatch.setitem(blocks.BLOCK_ENTRIES, "cpu", 8 * O)  # 5 blocks, none of them full
    yield
    scratch.release_scratch()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def signs(dtype: torch.dtype, heads: int = H) -> Tensor:
    return 0.1 * (1.0 - 2.0 * (torch.arange(heads, dtype=dtype) % 2))


def params_for(kernel: str, dtype: torch.dtype, heads: int = H, columns: int = q) -> list[Tensor]:
    params = [draw(heads, I, columns), draw(heads, O, columns, seed=1)]
    if kernel == "mixed":
        params += [torch.tensor([v]) for v in (0.7, 0.35, -0.02)]
    return [p.to(dtype).requires_grad_() for p in params]


def blocked(kernel: str = "mixed", rule: str = "squared", dtype: torch.dtype = torch.float32, **kw):
    level = 0.0 if rule == "none" else 0.3
    return KernelUpdate(signs(dtype, kw.pop("heads", H)), level, kernel, rule=rule, **kw)


def plain_delta(of: KernelUpdate, params: list[Tensor]) -> Tensor:
    A, B, *scalars = params
    return update(
        *(A, B, of.signs.to(A.dtype), *scalars),
        sparsity=of.sparsity,
        kernel=of.kernel,
        p=of.p,
        rule=of.rule,
        threshold=of.limit,
    ).T


def compare(of: KernelUpdate, params: list[Tensor], tolerance: float) -> None:
    """Output and every gradient, against the plain formula in float64."""
    dtype = params[0].dtype
    x, weight = draw(50, I, dtype=dtype).requires_grad_(), draw(O, I, seed=4, dtype=dtype)
    bias, gy = draw(O, dtype=dtype).requires_grad_(), draw(50, O, seed=9, dtype=dtype)
    weight.requires_grad_()
    y = merged_linear(x, weight, bias, of, params)
    got = torch.autograd.grad(y, [x, weight, bias, *params], gy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias, *params)]
    want_y = F.linear(exact[0], exact[1] + plain_delta(of, exact[3:]), exact[2])
    want = torch.autograd.grad(want_y, exact, gy.double())
    for a, b in zip((y, *got), (want_y, *want), strict=True):
        largest = float(b.detach().abs().max())
        assert float((a.double() - b).detach().abs().max()) <= tolerance * max(largest, 1e-30)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_equal_the_plain_formula(kernel: str, rule: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-6)):
        compare(blocked(kernel, rule, dtype), params_for(kernel, dtype), tolerance)


@pytest.mark.parametrize("rule", ["squared", "mask", "printed"])
def test_thresholds_without_ever_holding_the_matrix(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_update, "WHOLE_ENTRIES", 50)
    of, params = blocked(rule=rule), params_for("mixed", torch.float32)
    (limit, *_), kept = of.measure(params, scratch.Scratch())
    assert kept is None
    assert torch.equal(limit, threshold(of.whole(params), 0.3))
    compare(of, params, 5e-6)


@pytest.mark.parametrize(("heads", "columns"), [(1, 8), (3, 8), (4, 16), (2, 9)])
def test_any_number_of_heads_and_columns(heads: int, columns: int) -> None:
    params = params_for("mixed", torch.float32, heads, columns)
    compare(blocked(heads=heads), params, 5e-5)  # the sums that scalars get cancel here


@pytest.mark.parametrize("columns", [1, 4])
def test_few_columns_are_computed_directly(columns: int) -> None:
    of, params = blocked(), params_for("mixed", torch.float32, columns=columns)
    assert not of.by_products(params[0])
    compare(of, params, 1e-4)


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_other_norms(p: float) -> None:
    compare(blocked(dtype=torch.float64, p=p), params_for("mixed", torch.float64), 1e-9)
    compare(blocked(p=p), params_for("mixed", torch.float32), 2e-5)


@pytest.mark.parametrize("gamma", [3e-3, 1e-5, -1.0])
def test_small_temperatures_do_not_overflow(gamma: float) -> None:
    params = params_for("mixed", torch.float32)
    with torch.no_grad():
        params[0].mul_(3)
        params[3].fill_(gamma)
    of = blocked("mixed", "none")
    y = merged_linear(draw(5, I, dtype=torch.float32), torch.zeros(O, I), None, of, params)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), params))
    assert torch.allclose(of(*params), plain_delta(of, params), atol=1e-5)


@pytest.mark.parametrize("outputs", [23, 48, 320])
def test_equal_heads_of_opposite_sign_leave_exactly_nothing(outputs: int) -> None:
    params = params_for("mixed", torch.float32)
    params[1] = draw(H, outputs, q, dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        for points in params[:2]:
            points[1] = points[0]
        params[2].zero_()
        params[4].zero_()
    of = blocked(rule="mask")
    assert torch.equal(of(*params), torch.zeros(outputs, I))
    gradients = torch.autograd.grad(of(*params).sum(), params)  # `mask` lives at zero
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0][0], -gradients[0][1], rtol=1e-4, atol=1e-6)


def test_coincident_points_have_no_gradient() -> None:
    params = params_for("distance", torch.float32)
    with torch.no_grad():
        params[0][:, 3] = params[1][:, 5]
    of = blocked("distance", "none")
    delta = of(*params)
    assert float(delta[5, 3].detach()) == 0.0
    one = torch.zeros(O, I)
    one[5, 3] = 1.0
    for gradient in torch.autograd.grad(delta, params, one):
        assert not gradient.any()


def test_nothing_is_hidden() -> None:
    params = params_for("mixed", torch.float32)
    with torch.no_grad():
        params[0][0, 7, 2] = torch.nan
    of = blocked()
    assert of(*params)[:, 7].isnan().all()


def test_saved_are_the_input_the_params_and_one_threshold() -> None:
    params, of = params_for("mixed", torch.float32), blocked()
    x = draw(50, I, dtype=torch.float32).requires_grad_()
    weight = draw(O, I, dtype=torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        merged_linear(x, weight, None, of, params)
    known = {t.data_ptr() for t in (x, weight, *params)}
    rest = [t for t in saved if t.data_ptr() not in known]
    assert [t.numel() for t in rest] == [1]


def test_a_sum_of_adapters_is_the_sum_of_their_updates() -> None:
    one, two = params_for("mixed", torch.float32), params_for("distance", torch.float32)
    of = [blocked(), blocked("distance", "mask")]
    both = ScaledSum([(of[0], 5, 0.5), (of[1], 2, -2.0)])
    want = 0.5 * plain_delta(of[0], one) - 2.0 * plain_delta(of[1], two)
    torch.testing.assert_close(both(*one, *two), want, rtol=1e-5, atol=1e-6)
    x, weight = draw(9, I, dtype=torch.float32), draw(O, I, dtype=torch.float32)
    got = torch.autograd.grad(
        merged_linear(x, weight, None, both, [*one, *two]).square().sum(), [*one, *two]
    )
    expected = torch.autograd.grad(F.linear(x, weight + want).square().sum(), [*one, *two])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_a_sum_with_a_plain_function_is_one_block() -> None:
    params, low = params_for("mixed", torch.float32), [draw(O, I).float().requires_grad_()]
    both = ScaledSum([(blocked(), 5, 1.0), (WholeUpdate(lambda d: d * 2), 1, 3.0)])
    assert list(both.columns([*params, *low])) == [slice(None)]
    x = draw(9, I, dtype=torch.float32)
    y = merged_linear(x, torch.zeros(O, I), None, both, [*params, *low])
    gradients = torch.autograd.grad(y.sum(), [*params, *low])
    torch.testing.assert_close(y, F.linear(x, plain_delta(blocked(), params) + 6 * low[0]))
    torch.testing.assert_close(gradients[-1], 6 * x.sum(0).expand(O, I))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    params, of = params_for("mixed", torch.float32), blocked()
    x = draw(9, I, dtype=torch.float32).requires_grad_()
    weight = draw(O, I, dtype=torch.float32)

    def layer(x: Tensor) -> Tensor:
        return merged_linear(x.tanh(), weight, None, of, params)

    want = torch.autograd.grad(layer(x).square().sum(), [x, *params])
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a.grad, b) for a, b in zip([x, *params], want, strict=True))


def test_gradients_accumulate() -> None:
    params, of = params_for("mixed", torch.float32), blocked()
    x, weight = draw(8, I, dtype=torch.float32), draw(O, I, dtype=torch.float32)
    merged_linear(x, weight, None, of, params).sum().backward()
    whole = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    for part in (x[:3], x[3:]):
        merged_linear(part, weight, None, of, params).sum().backward()
    for p, want in zip(params, whole, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_small_update_survives_a_16_bit_base_in_two_products(low: torch.dtype) -> None:
    params, of = params_for("mixed", torch.float32), blocked()
    small = ScaledSum([(of, 5, 1e-4)])  # far below half a unit of the weights' last place
    x, weight = draw(50, I, dtype=low).requires_grad_(), (1 + draw(O, I).abs()).to(low)
    base = F.linear(x, weight)
    want = F.linear(x.double(), 1e-4 * plain_delta(of, params).double())
    apart = merged_linear(x, torch.zeros_like(weight), None, small, params, folds=False)
    largest = float(want.detach().abs().max())
    torch.testing.assert_close(apart.double(), want, rtol=2e-2, atol=2e-2 * largest)
    folded = merged_linear(x, weight, None, small, params)
    assert torch.equal(folded, base)  # lost: why two products are the default there
    beside = merged_linear(x, weight, None, small, params, folds=False)
    assert beside.dtype == low
    (gx,) = torch.autograd.grad(beside.sum(), x)
    torch.testing.assert_close(gx.float(), weight.float().sum(0).expand(50, I), rtol=2e-2, atol=0.1)


def test_without_a_weight_it_is_the_update_alone() -> None:
    params, of = params_for("mixed", torch.float32), blocked()
    x = draw(9, I, dtype=torch.float32).requires_grad_()
    y = merged_linear(x, None, None, of, params)
    torch.testing.assert_close(y, F.linear(x, plain_delta(of, params)), rtol=1e-5, atol=1e-5)
    (gx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        gx, plain_delta(of, params).sum(0).expand(9, I), rtol=1e-5, atol=1e-5
    )


def test_autocast_reaches_the_product_alone() -> None:
    params, of = params_for("mixed", torch.float32), blocked()
    x, weight = draw(9, I, dtype=torch.float32), draw(O, I, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = merged_linear(x, weight, None, of, params, folds=False)
    assert y.dtype == torch.bfloat16
    want = F.linear(x, weight + plain_delta(of, params))
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=0.1)
    got = torch.autograd.grad(y, params, torch.ones_like(y))
    expected = torch.autograd.grad(want, params, torch.ones_like(want))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_work_memory_goes_back_to_the_pool_and_never_into_results() -> None:
    params, of = params_for("mixed", torch.float32), blocked()
    first = of(*params)
    merged_linear(draw(9, I, dtype=torch.float32), torch.zeros(O, I), None, of, params)
    assert scratch._pool
    pooled = {t.untyped_storage().data_ptr() for kept in scratch._pool for t in kept.flat.values()}
    assert first.untyped_storage().data_ptr() not in pooled
    before = first.clone()
    with torch.no_grad():
        params[0].mul_(2)
    of(*params)
    assert torch.equal(first, before)
    with torch.inference_mode():
        merged_linear(draw(9, I, dtype=torch.float32), torch.zeros(O, I), None, of, params)
    of(*params).sum().backward()  # what was taken in inference mode serves outside of it
    kept = weakref.ref(next(iter(scratch._pool[0].flat.values())))
    scratch.release_scratch()
    gc.collect()
    assert kept() is None


def test_shapes_alone_are_enough() -> None:
    with FakeTensorMode():
        params = [torch.empty(H, I, q), torch.empty(H, O, q), *(torch.ones(1) for _ in range(3))]
        for p in params:
            p.requires_grad_()
        x = torch.empty(5, I, requires_grad=True)
        of = KernelUpdate(torch.ones(H), 0.5)
        y = merged_linear(x, torch.empty(O, I), None, of, params)
        y.sum().backward()
        assert params[0].grad.shape == params[0].shape
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("size", [1, 2, 100, 40_000, 200_001])
@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "mostly zero"])
def test_thresholds_are_those_of_a_sort(size: int, kind: str) -> None:
    w = draw(size, dtype=torch.float32)
    if kind == "ties":
        w = w.round()
    elif kind == "sorted":
        w = w.sort().values
    elif kind == "mostly zero":
        w = torch.where(w > 1, w, 0.0)
    before = w.clone()
    ordered = w.abs().sort().values
    for level in (0.0, 0.013, 0.5, 0.97, 0.99999, 1.0):
        position = level * (size - 1)
        low, high = ordered[int(position)], ordered[min(int(position) + 1, size - 1)]
        want = torch.lerp(low, high, position - int(position))
        torch.testing.assert_close(threshold(w, level), want, rtol=0, atol=0)
    torch.testing.assert_close(w, before, rtol=0, atol=0)


def test_sparsify_has_one_formula_compiled_or_not() -> None:
    w, g = draw(6, 5).requires_grad_(), draw(6, 5, seed=2)
    for rule in RULES:
        level = 0.0 if rule == "none" else 0.4
        (plain,) = torch.autograd.grad(sparsify(w, level, rule), w, g)
        torch._dynamo.reset()
        compiled = torch.compile(sparsify, backend="aot_eager", fullgraph=True)
        (traced,) = torch.autograd.grad(compiled(w, level, rule), w, g)
        torch.testing.assert_close(plain, traced, rtol=1e-12, atol=1e-12)
