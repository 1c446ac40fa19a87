from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from snell_diffusion.core import KERNELS, RULES, FirstThreshold, merged_linear, update

I, O, H, q = 12, 10, 2, 8
SIGNS = torch.tensor([0.1, -0.1], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def params_for(kernel: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    params = [draw(H, I, q), draw(H, O, q, seed=1)]
    if kernel == "mixed":
        params += [torch.tensor([v], dtype=torch.float64) for v in (0.7, 0.35, -0.02)]
    return [p.to(dtype).requires_grad_() for p in params]


class Delta:
    """Params -> [O, I], counting its calls."""

    def __init__(self, kernel: str = "mixed", rule: str = "squared", sparsity: float = 0.3) -> None:
        self.kernel, self.rule, self.calls = kernel, rule, 0
        self.sparsity = 0.0 if rule == "none" else sparsity

    def __call__(self, A: Tensor, B: Tensor, *scalars: Tensor) -> Tensor:
        self.calls += 1
        signs = SIGNS.to(A.dtype)
        options = {"kernel": self.kernel, "rule": self.rule}
        return update(A, B, signs, *scalars, sparsity=self.sparsity, **options).T


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Callable[..., Tensor],
    params: list[Tensor],
) -> Tensor:
    return F.linear(x, weight + delta(*params), bias)


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, draw(*y.shape, seed=9).to(y.dtype))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_plain_formulation(kernel: str, rule: str) -> None:
    params, delta = params_for(kernel), Delta(kernel, rule)
    x, weight, bias = draw(2, 3, I).requires_grad_(), draw(O, I).requires_grad_(), draw(O)
    bias.requires_grad_()
    inputs = [x, weight, bias, *params]
    got = merged_linear(x, weight, bias, delta, params)
    want = plain(x, weight, bias, delta, params)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_gradients_are_derivatives() -> None:
    params, delta = params_for("mixed"), Delta(rule="mask", sparsity=0.3)
    x, weight, bias = draw(3, I).requires_grad_(), draw(O, I), draw(O)
    assert torch.autograd.gradcheck(
        lambda x, *p: merged_linear(x, weight, bias, delta, list(p)), (x, *params)
    )


@pytest.mark.parametrize("shape", [(I,), (0, I), (1, I), (2, 3, 4, I)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    params, delta = params_for("mixed"), Delta()
    x, weight, bias = draw(*shape).requires_grad_(), draw(O, I), draw(O).requires_grad_()
    inputs = [x, bias, *params]
    got, want = (f(x, weight, bias, delta, params) for f in (merged_linear, plain))
    assert got.shape == (*shape[:-1], O)
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_one_input_one_output_and_strided_input() -> None:
    A, B = draw(H, 1, q).requires_grad_(), draw(H, 1, q, seed=1).requires_grad_()
    delta = Delta("distance", "none")
    x = draw(1, 5).T.requires_grad_()
    got, want = (f(x, draw(1, 1), None, delta, [A, B]) for f in (merged_linear, plain))
    for a, b in zip(gradients(got, [x, A, B]), gradients(want, [x, A, B]), strict=True):
        torch.testing.assert_close(a, b)
    x = draw(I, 7, 2).permute(1, 2, 0)
    params = params_for("mixed")
    got, want = (f(x, draw(O, I), None, Delta(), params) for f in (merged_linear, plain))
    torch.testing.assert_close(got, want)


def test_only_what_requires_gradients_gets_them() -> None:
    params, delta = params_for("mixed"), Delta()
    params[2].requires_grad_(False)
    x, weight = draw(3, I), draw(O, I)
    merged_linear(x, weight, None, delta, params).sum().backward()
    assert params[2].grad is None
    assert all(p.grad is not None for p in params if p is not params[2])
    assert weight.grad is None
    for p in params:
        p.requires_grad_(False)
    x.requires_grad_()
    merged_linear(x, weight, None, delta, params).sum().backward()
    torch.testing.assert_close(x.grad, (weight + delta(*params)).sum(0).expand(3, I))


def test_a_param_delta_does_not_use_gets_no_gradient() -> None:
    params = params_for("distance")
    unused = torch.ones(1, requires_grad=True)
    y = merged_linear(
        draw(3, I), draw(O, I), None, lambda A, B, _: Delta("distance")(A, B), [*params, unused]
    )
    y.sum().backward()
    assert params[0].grad is not None
    assert unused.grad is None


def test_delta_is_built_once_per_pass() -> None:
    params, delta = params_for("mixed"), Delta()
    x, weight = draw(3, I).requires_grad_(), draw(O, I)
    with torch.no_grad():
        merged_linear(x, weight, None, delta, params)
    assert delta.calls == 1
    y = merged_linear(x, weight, None, delta, params)
    assert delta.calls == 2
    y.sum().backward()
    assert delta.calls == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    params, delta = params_for("mixed"), Delta()
    x, weight = draw(3, I).requires_grad_(), draw(O, I)

    def block(x: Tensor) -> Tensor:
        return merged_linear(x.tanh(), weight, None, delta, params).tanh()

    want = gradients(block(x), [x, *params])
    delta.calls = 0
    y = checkpoint(block, x, use_reentrant=reentrant)
    y.backward(draw(*y.shape, seed=9))
    assert delta.calls == 3  # forward, recomputed forward, backward
    for leaf, expected in zip([x, *params], want, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_checkpointing_reaches_params_when_the_input_needs_no_gradient() -> None:
    params, delta = params_for("mixed"), Delta()
    y = checkpoint(
        lambda x: merged_linear(x, draw(O, I), None, delta, params), draw(3, I), use_reentrant=False
    )
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in params)


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    params, delta = params_for("mixed", torch.float32), Delta()
    x, weight = draw(50, I).float().requires_grad_(), draw(O, I).float()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        merged_linear(x, weight, None, delta, params)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in params}
    given = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, weight)}
    assert kept == owned | given  # no copy, nothing of the size of Delta: x is all that is held


def test_changing_a_param_before_the_backward_pass_is_an_error() -> None:
    params, delta = params_for("mixed"), Delta()
    y = merged_linear(draw(3, I), draw(O, I), None, delta, params)
    with torch.no_grad():
        params[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_threshold_serves_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("snell_diffusion.core.sparsify")
    quantile, calls = module.threshold, []

    def counting(w: Tensor, sparsity: float) -> Tensor:
        calls.append(sparsity)
        return quantile(w, sparsity)

    monkeypatch.setattr(module, "threshold", counting)
    params = params_for("mixed")
    once = FirstThreshold(0.3)

    def delta(A: Tensor, B: Tensor, *scalars: Tensor) -> Tensor:
        return update(A, B, SIGNS, *scalars, sparsity=0.3, threshold=once).T

    got = gradients(merged_linear(draw(3, I), draw(O, I), None, delta, params), params)
    assert calls == [0.3]
    want = merged_linear(draw(3, I), draw(O, I), None, Delta(), params)
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(want, params), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_weights_of_lower_precision(dtype: torch.dtype) -> None:
    params, delta = params_for("mixed", torch.float32), Delta(sparsity=0.5)
    x, weight, bias = (t.to(dtype) for t in (draw(2, 5, I), draw(O, I), draw(O)))
    x.requires_grad_()
    y = merged_linear(x, weight, bias, delta, params)
    got = gradients(y, [x, *params])
    wide = [t.detach().double().requires_grad_() for t in (x, *params)]
    want_y = plain(wide[0], weight.double(), bias.double(), delta, wide[1:])
    want = gradients(want_y, wide)

    assert y.dtype == got[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in got[1:])
    tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for a, b in zip((y, *got), (want_y, *want), strict=True):
        error = (a.double() - b).detach().abs().max()
        assert error < tolerance * b.detach().abs().max()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_product_and_not_the_update(low: torch.dtype) -> None:
    params = params_for("mixed", torch.float32)
    seen: list[torch.dtype] = []

    def delta(*p: Tensor) -> Tensor:
        seen.append((p[0][0] @ p[1][0].T).dtype)
        return Delta()(*p)

    x, weight = draw(2, 5, I).float().requires_grad_(), draw(O, I).float()
    with torch.autocast("cpu", low):
        y = merged_linear(x, weight, None, delta, params)
    got = gradients(y, [x, *params])
    assert seen == [torch.float32, torch.float32]
    assert y.dtype == low
    assert torch.equal(y, F.linear(x.to(low), (weight + Delta()(*params)).to(low)))
    assert all(g.dtype == torch.float32 for g in got)
    want = gradients(plain(x, weight, None, Delta(), params), [x, *params])
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) < 8 * torch.finfo(low).eps * float(b.abs().max())


def test_backward_under_autocast_is_the_same() -> None:
    params = params_for("linear", torch.float32)
    delta = Delta("linear", "mask")
    x, weight = draw(5, I).float(), draw(O, I).float()
    y = merged_linear(x, weight, None, delta, params)
    want = gradients(y, params)
    y = merged_linear(x, weight, None, delta, params)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(y, params)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_float16_token_sums_do_not_overflow() -> None:
    params = params_for("distance", torch.float32)
    x = torch.full((1000, I), 30.0, dtype=torch.float16)
    y = merged_linear(x, draw(O, I).half() * 0.01, None, Delta("distance", "none"), params)
    grads = torch.autograd.grad(y, params, torch.full_like(y, 30.0))  # 9e5 per entry of Delta
    assert all(g.isfinite().all() for g in grads)


def test_delta_in_the_wrong_layout_is_an_error() -> None:
    params = params_for("distance")
    with pytest.raises(ValueError, match=r"must return \[O, I\] = \[10, 12\], got \[12, 10\]"):
        merged_linear(draw(3, I), draw(O, I), None, lambda *p: Delta("distance")(*p).T, params)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_compiles_as_one_graph(backend: str, low: torch.dtype | None) -> None:
    params = params_for("mixed", torch.float32)
    weight, bias, signs = draw(O, I).float(), draw(O).float(), SIGNS.float()

    def layer(x: Tensor) -> Tensor:
        once = FirstThreshold(0.5)
        fn = lambda A, B, *s: update(A, B, signs, *s, sparsity=0.5, threshold=once).T  # noqa: E731
        return merged_linear(x, weight, bias, fn, params)

    x = draw(5, I).float()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        got, want = compiled(x), layer(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if low is None else 2e-2
    for a, b in zip(gradients(got, params), gradients(want, params), strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())
