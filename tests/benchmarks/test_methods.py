"""Every method computes what its name says, on weights that it shares with the others."""

import pytest
import torch

from benchmarks.layers import TARGETS, LinearModel, LinearStep
from benchmarks.methods import ADAPTER, METHODS, Ranks, adapt, trained_bytes, twin, unavailable
from benchmarks.plain import PlainLinear, make_plain, plain_update, sorted_quantile
from snell_diffusion.core import threshold, update
from snell_diffusion.tuners import SnellaConfig, delta_layers

I, O, T = 40, 48, 32
CPU = torch.device("cpu")


@pytest.fixture
def base():
    torch.manual_seed(0)
    return LinearModel(I, O)


def factors(seed=0, r=32, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(2, I, r // 2, generator=draw, dtype=dtype).requires_grad_()
    B = torch.randn(2, O, r // 2, generator=draw, dtype=dtype).requires_grad_()
    mixers = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in (1.2, 0.8, 0.01)]
    return A, B, torch.tensor([0.1, -0.1], dtype=dtype), *mixers


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9])
def test_the_plain_update_is_ours_with_the_same_gradients(sparsity):
    mine, plain = factors(dtype=torch.float64), factors(dtype=torch.float64)
    G = torch.randn(I, O, dtype=torch.float64)
    expected, found = update(*mine, sparsity), plain_update(*plain, sparsity)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    (expected * G).sum().backward()
    (found * G).sum().backward()
    for a, b in zip(mine, plain, strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.999, 1.0])
def test_the_sorted_quantile_is_torchs_and_ours(level):
    a = torch.randn(57, 31, generator=torch.Generator().manual_seed(1)).abs()
    found = sorted_quantile(a, level)
    torch.testing.assert_close(found, torch.quantile(a.flatten(), level))
    torch.testing.assert_close(found, threshold(a, level))


@pytest.mark.parametrize("method", ["plain", "plain_kept", "fused"])
def test_the_ways_of_snella_give_one_output_and_one_gradient(base, method):
    x, gy = torch.randn(T, I, requires_grad=True), torch.randn(T, O)
    found = {}
    for name in ("ours", method):
        model = adapt(twin(base), name, TARGETS)
        x.grad = None
        y = model(x)
        y.backward(gy)
        grads = sorted((tuple(p.shape), p.grad) for p in model.parameters() if p.requires_grad)
        found[name] = [y, x.grad, *(grad for _, grad in grads[-2:])]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def test_our_output_is_the_base_and_the_update(base):
    model = adapt(twin(base), "ours", TARGETS)
    ((_, layer),) = delta_layers(model, ADAPTER)
    x = torch.randn(T, I)
    expected = base(x) + x @ layer.get_delta_weight(ADAPTER).T
    torch.testing.assert_close(model(x), expected)


def test_the_plain_branch_is_recomputed_unless_it_is_kept(base):
    x, gy = torch.randn(T, I, requires_grad=True), torch.randn(T, O)
    saved = {
        method: LinearStep(base, method, x, gy).cost().saved for method in ("plain", "plain_kept")
    }
    assert saved["plain"] == 4 * T * I  # the input alone
    assert saved["plain_kept"] >= saved["plain"] + 5 * 4 * I * O


@pytest.mark.parametrize(
    "changes, got",
    [({"kernel": "distance"}, "distance"), ({"p": 3.0}, "p=3"), ({"sparsify": "mask"}, "mask")],
)
def test_there_is_one_plain_formulation(base, changes, got):
    from peft import inject_adapter_in_model

    config = SnellaConfig.paper(r=8, target_modules=list(TARGETS), **changes)
    inject_adapter_in_model(config, base, ADAPTER)
    with pytest.raises(ValueError, match=got):
        make_plain(base, ADAPTER)


def test_twins_share_every_weight(base):
    other = twin(base)
    assert other is not base
    assert other.linear.weight is base.linear.weight


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_leave_the_shared_weights_frozen_and_alone(base, method):
    before = base.linear.weight.clone()
    bystander = adapt(twin(base), "lora", TARGETS)
    step = LinearStep(base, method, torch.randn(T, I, requires_grad=True), torch.randn(T, O))
    step()
    assert torch.equal(base.linear.weight, before)
    assert not bystander.linear.base_layer.weight.requires_grad
    assert step.x.grad is None
    assert all(p.grad is None for p in step.model.parameters())
    assert (trained_bytes(step.model) > 0) == (method != "base")
    weight = next(p for n, p in step.model.named_parameters() if n.endswith("weight"))
    shared = step.model.linear.weight if method in ("base", "full") else weight
    assert shared.data_ptr() == base.linear.weight.data_ptr() or method not in ("base", "full")


def test_ranks_give_equal_numbers(base):
    numbers = {
        method: trained_bytes(adapt(twin(base), method, TARGETS, Ranks.equal(16))) // 4
        for method in ("lora", "shira", "plain", "ours")
    }
    assert numbers["lora"] == numbers["shira"] == 16 * (I + O)
    assert numbers["ours"] == numbers["plain"] == 16 * (I + O) + 3  # alpha, gamma, beta


def test_factors_of_a_16_bit_base_are_16_or_32_bit():
    low = LinearModel(I, O, torch.bfloat16)
    sizes = {m: trained_bytes(adapt(twin(low), m, TARGETS)) for m in ("lora", "lora_fp32")}
    assert sizes["lora_fp32"] == 2 * sizes["lora"]


def test_unknown_methods_are_refused(base):
    with pytest.raises(ValueError, match=r"'lore' is unknown; known: base, full, lora"):
        adapt(base, "lore", TARGETS)


def test_the_fused_kernels_are_left_out_of_a_cpu_with_a_reason():
    assert "NVIDIA GPU" in unavailable("fused", CPU)
    assert [m for m in METHODS if unavailable(m, CPU)] == ["fused"]


def test_a_plain_layer_shares_the_factors(base):
    model = adapt(base, "ours", TARGETS)
    A, B = model.linear.factors(ADAPTER)
    make_plain(model, ADAPTER)
    assert isinstance(model.linear, PlainLinear)
    assert model.linear.A is A
    assert model.linear.B is B


@pytest.mark.parametrize("method", ["base", "lora", "shira", "plain", "ours"])
def test_what_a_method_does_not_train_is_frozen(base, method):
    model = adapt(base, method, TARGETS)
    weights = {n for n, p in model.named_parameters() if p.shape == (O, I) and p.requires_grad}
    assert not weights
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))
