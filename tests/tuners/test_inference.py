"""Outside of training a layer costs what its base costs, and notices every change."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snell_diffusion.tuners import SnellaConfig, delta_layers, effective
from snell_diffusion.tuners.snella import SnellaConvLayer, SnellaLayer
from snell_diffusion.tuners.weights import TOLERATED_LOSS, realised_error

I, O = 24, 40
Layer = SnellaLayer


class Operations(TorchDispatchMode):
    """Names and result sizes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.seen += [(str(func), tuple(tensor.shape)) for tensor in made]
        return result


def operations(module: nn.Module, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    with torch.no_grad(), Operations() as counted:
        module(x)
    return counted.seen


def built(base: nn.Module, **changes: Any) -> Layer:
    """A finished adapter on a base: frozen, its update a tenth of the weight and more."""
    kind = SnellaConvLayer if isinstance(base, nn.Conv2d) else SnellaLayer
    config = SnellaConfig.paper(**{"r": 8, "seed": 0, "inference_mode": True, **changes})
    layer = kind(base.requires_grad_(False), "default", config, key="layer").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.delta_params("default"):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def linear(dtype: torch.dtype = torch.float32, **changes: Any) -> Layer:
    torch.manual_seed(7)
    return built(nn.Linear(I, O).to(dtype), **changes)


def conv(padding_mode: str = "zeros", **changes: Any) -> Layer:
    torch.manual_seed(7)
    return built(nn.Conv2d(6, 8, 3, padding="same", padding_mode=padding_mode, **changes))


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, I, generator=torch.Generator().manual_seed(1)).to(dtype)


def pixels() -> Tensor:
    return torch.randn(2, 6, 7, 5, generator=torch.Generator().manual_seed(1))


def evaluate(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def anew(layer: Layer, x: Tensor) -> Tensor:
    """What a layer answers that keeps nothing."""
    twin = copy.deepcopy(layer)
    twin.cache_in_eval = False
    return evaluate(twin, x)


# Cost


CASES = {
    "float32": lambda: (linear(), tokens()),
    "float64": lambda: (linear().double(), tokens(torch.float64)),
    "bfloat16": lambda: (linear(torch.bfloat16), tokens(torch.bfloat16)),
    "float16": lambda: (linear(torch.float16), tokens(torch.float16)),
    "convolution": lambda: (conv(), pixels()),
    "circular convolution": lambda: (conv("circular"), pixels()),
    "no bias": lambda: (built(nn.Linear(I, O, bias=False)), tokens()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kept_call_runs_exactly_what_the_base_runs(case: str) -> None:
    layer, x = CASES[case]()
    expected = operations(copy.deepcopy(layer.base_layer), x)
    first = operations(layer, x)
    assert len(first) > len(expected) + 10
    assert operations(layer, x) == expected
    assert layer._kept is not None
    assert layer._kept.folded


@pytest.mark.parametrize("case", CASES)
def test_a_fused_call_runs_exactly_what_the_base_runs(case: str) -> None:
    layer, x = CASES[case]()
    expected = operations(copy.deepcopy(layer.base_layer), x)
    layer.merge()
    assert operations(layer, x) == expected
    assert layer._kept is None


@pytest.mark.parametrize("case", CASES)
def test_the_kept_weight_is_the_merged_one_bit_for_bit(case: str) -> None:
    layer, x = CASES[case]()
    kept = evaluate(layer, x)
    assert layer._kept is not None
    weight = layer._kept.weight.clone()
    layer.merge()
    assert torch.equal(layer.get_base_layer().weight, weight)
    assert torch.equal(evaluate(layer, x), kept)


def test_autocast_multiplies_by_a_weight_that_is_lowered_once() -> None:
    layer, x = linear(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        first, kept = evaluate(layer, x), layer._kept
        assert kept is not None
        assert kept.weight.dtype == torch.bfloat16
        assert torch.equal(evaluate(layer, x), first)
        assert layer._kept is kept
        layer.fold_16bit = False
        beside = evaluate(layer, x)
    assert first.dtype == beside.dtype == torch.bfloat16
    torch.testing.assert_close(first, beside, rtol=0.05, atol=0.05)
    assert evaluate(layer, x).dtype == torch.float32


def test_beside_a_base_that_cannot_be_folded_into_one_product_is_added() -> None:
    layer, x = linear(), tokens()
    layer.base_layer.register_forward_hook(lambda *_: None)
    expected = operations(copy.deepcopy(layer.base_layer), x)
    evaluate(layer, x)
    more = [name for name, _ in operations(layer, x)][len(expected) :]
    assert [name for name in more if "view" not in name and "aten.t." not in name] == [
        "aten.mm.default",
        "aten.add.Tensor",
    ]


# What 16 bits lose


def small(layer: Layer, ratio: float) -> Layer:
    """Scaled so that |ΔW| is a share of |W|."""
    size = layer.get_delta_weight("default").norm() / layer.get_base_layer().weight.norm()
    layer.set_scale("default", ratio / float(size))
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio, folded", [(0.3, True), (1e-5, False)])
def test_updates_are_folded_into_16_bits_unless_they_would_be_lost(
    dtype: torch.dtype, ratio: float, folded: bool
) -> None:
    layer = small(linear(dtype), ratio)
    evaluate(layer, tokens(dtype))
    assert layer._kept is not None
    assert layer._kept.folded is folded
    weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
    lost = realised_error(weight, layer.folded(weight, delta), delta)
    assert (lost <= TOLERATED_LOSS) is folded


def test_small_updates_keep_their_effect_on_a_16_bit_base() -> None:
    layer, x = small(linear(torch.bfloat16), 1e-5), tokens(torch.bfloat16)
    added = evaluate(layer, x) - evaluate(layer.base_layer, x)
    layer.fold_16bit = True
    folded = evaluate(layer, x) - evaluate(layer.base_layer, x)
    exact = x.float() @ layer.get_delta_weight("default").detach().T
    assert layer._kept is not None
    assert layer._kept.folded
    assert float(layer._kept.weight.ne(layer.base_layer.weight).sum()) < 0.05 * I * O
    assert float((folded.float() - exact).norm()) > 0.5 * float(exact.norm())
    assert float((added.float() - exact).norm()) < 300 * float(exact.norm())


def test_updates_in_training_are_not_folded_into_16_bits() -> None:
    layer, x = linear(torch.bfloat16), tokens(torch.bfloat16)
    layer.set_adapter("default", inference_mode=False)
    evaluate(layer, x)
    assert layer._kept is not None
    assert not layer._kept.folded


# Validity


def put(container: Any, name: str) -> None:
    container[name] = nn.Parameter(container[name].detach() * 2, requires_grad=False)


def base_of(layer: Layer) -> Any:
    return layer.get_base_layer()


@torch.no_grad()
def grow(tensor: Tensor) -> None:
    tensor.mul_(1.5)


def another_base(layer: Layer) -> None:
    layer.base_layer = nn.Linear(I, O).requires_grad_(False)


def another_data(layer: Layer) -> None:
    base_of(layer).weight.data = torch.ones(O, I)


def another_weight(layer: Layer) -> None:
    base_of(layer).weight = nn.Parameter(torch.ones(O, I), requires_grad=False)


def a_hook(layer: Layer) -> None:
    base_of(layer).register_forward_hook(lambda _, args, y: y + 1)


def a_patch(layer: Layer) -> None:
    base = base_of(layer)
    base.forward = lambda x: nn.functional.linear(x, base.weight) + 5


CHANGES: dict[str, Callable[[Layer], Any]] = {
    "A in place": lambda layer: grow(layer.snella_A["default"]),
    "gamma in place": lambda layer: grow(layer.snella_gamma["default"]),
    "signs in place": lambda layer: grow(layer.snella_signs["default"]),
    "A replaced": lambda layer: put(layer.snella_A, "default"),
    "level": lambda layer: layer.set_sparsity("default", 0.9),
    "strength": lambda layer: layer.set_scale("default", 0.5),
    "strength set directly": lambda layer: layer.scaling.update(default=0.25),
    "call-time scale": lambda layer: layer.scale_layer(0.5),
    "base in place": lambda layer: grow(base_of(layer).weight),
    "base's data replaced": another_data,
    "base's weight replaced": another_weight,
    "base replaced": another_base,
    "bias in place": lambda layer: grow(base_of(layer).bias),
    "hook on the base": a_hook,
    "base's forward patched": a_patch,
    "off": lambda layer: layer.enable_adapters(False),
    "none active": lambda layer: layer.set_adapter([]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_at_the_next_call(name: str) -> None:
    layer, x = linear(), tokens()
    before = evaluate(layer, x)
    CHANGES[name](layer)
    after = evaluate(layer, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew(layer, x))
    assert torch.equal(evaluate(layer, x), after)


@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_an_optimizer_on_the_base_are_seen(fused: bool) -> None:
    """The fused one changes weights without counting it."""
    layer, x = linear(), tokens()
    weight = base_of(layer).weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    layer(x).square().sum().backward()
    before = evaluate(layer, x)
    optimizer.step()
    after = evaluate(layer, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew(layer, x))


def test_a_second_adapter_acts_when_it_comes_and_goes() -> None:
    layer, x = linear(), tokens()
    alone = evaluate(layer, x)
    config = SnellaConfig.paper(r=4, seed=5, inference_mode=True, scale=1e3)
    layer.update_layer("other", config, "layer")
    layer.set_adapter(["default", "other"], inference_mode=True)
    both = evaluate(layer, x)
    assert torch.equal(both, anew(layer, x))
    assert not torch.equal(both, alone)
    layer.delete_adapter("other")
    assert torch.equal(evaluate(layer, x), alone)


def test_merging_of_another_tuner_is_seen() -> None:
    """PEFT's LoRA writes through `weight.data`, which nothing counts; fusing tells all layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, O).requires_grad_(False))
    snella = SnellaConfig.paper(r=8, seed=0, target_modules=["0"], scale=1e3, inference_mode=True)
    inject_adapter_in_model(snella, model, "snella")
    with warnings.catch_warnings(action="ignore"):  # PEFT notes that there is an adapter already
        lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, inference_mode=True)
        inject_adapter_in_model(lora, model, "lora")
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert [isinstance(tuner, SnellaLayer) for tuner in tuners] == [False, True]
    for tuner in tuners:
        tuner.set_adapter(["snella", "lora"], inference_mode=True)
    x, layer = tokens(), tuners[1]
    apart = evaluate(model.eval(), x)
    assert layer._kept is not None
    for tuner in tuners:
        tuner.merge(adapter_names=["lora"])
    torch.testing.assert_close(evaluate(model, x), apart)
    assert layer._kept is not None
    tuners[0].unmerge()
    with pytest.warns(UserWarning, match="nothing is merged"):
        tuners[1].unmerge()
    torch.testing.assert_close(evaluate(model, x), apart)


def test_nothing_is_computed_again_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(), tokens()
    calls: list[Any] = []
    original = layer._combined
    monkeypatch.setattr(layer, "_combined", lambda *a: calls.append(a) or original(*a))
    expected = evaluate(layer, x)
    evaluate(layer, x[:1])
    layer.set_scale("default", 1.0)
    layer.set_adapter("default", inference_mode=True)
    layer.scale_layer(0.5)
    layer.unscale_layer(0.5)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer.enable_adapters(False)
    evaluate(layer, x)
    layer.enable_adapters(True)
    layer.set_adapter("default", inference_mode=True)
    assert torch.equal(evaluate(layer, x), expected)
    assert len(calls) == 1


def test_what_is_kept_in_inference_mode_serves_gradients_of_the_input() -> None:
    layer, x = linear(), tokens()
    with torch.inference_mode():
        layer(x)
    kept = layer._kept
    assert kept is not None
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert layer._kept is kept
    weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x).contiguous())


def test_gradients_reach_what_wants_them_past_a_kept_weight() -> None:
    layer, x = linear(), tokens()
    evaluate(layer, x)
    layer.set_adapter("default", inference_mode=False)
    layer(x).sum().backward()
    assert float(layer.snella_A["default"].grad.abs().sum()) > 0
    layer.set_adapter("default", inference_mode=True)
    evaluate(layer, x)
    base_of(layer).weight.requires_grad_(True)
    layer(x).sum().backward()
    assert float(base_of(layer).weight.grad.abs().sum()) > 0


# Release


RELEASES: dict[str, Callable[[Layer], Any]] = {
    "clear_cache": lambda layer: layer.clear_cache(),
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "merge": lambda layer: layer.merge(),
    "cast": lambda layer: layer.double(),
    "another adapter": lambda layer: layer.set_adapter([]),
    "a new adapter": lambda layer: layer.update_layer("b", SnellaConfig.paper(r=4), "layer"),
}


@pytest.mark.parametrize("name", RELEASES)
def test_it_is_released(name: str) -> None:
    layer = linear()
    evaluate(layer, tokens())
    assert layer._kept is not None
    RELEASES[name](layer)
    assert layer._kept is None


def test_copies_and_pickles_take_none_along() -> None:
    layer, x = linear(), tokens()
    expected = evaluate(layer, x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._kept is None
        assert torch.equal(evaluate(twin, x), expected)
        assert twin._kept is not None
    assert not any("kept" in name for name in layer.state_dict())


def test_a_peft_model_releases_all() -> None:
    torch.manual_seed(0)
    config = SnellaConfig.paper(r=8, seed=0, target_modules=["0", "1"])
    model = get_peft_model(nn.Sequential(nn.Linear(I, O), nn.Linear(O, I)), config).eval()
    evaluate(model, tokens())
    layers = [layer for _, layer in delta_layers(model)]
    assert all(layer._kept is not None for layer in layers)
    model.clear_cache()
    assert all(layer._kept is None for layer in layers)


# Bounds


def test_nothing_is_kept_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(), tokens()
    expected = evaluate(layer, x)
    layer.clear_cache()
    monkeypatch.setattr(effective, "SPARED", 1.1)
    assert torch.equal(evaluate(layer, x), expected)
    assert layer._kept is None
    layer.cache_in_eval = True
    assert torch.equal(evaluate(layer, x), expected)
    assert layer._kept is not None
    layer.cache_in_eval = False
    assert torch.equal(evaluate(layer, x), expected)
    assert layer._kept is None


def test_parameters_of_inference_mode_are_not_kept() -> None:
    """They count no versions, so that a change could not be seen."""
    with torch.inference_mode():
        layer, x = linear(), tokens()
        first = layer(x)
        assert layer._kept is None
        layer.snella_A["default"].mul_(2)
        assert not torch.equal(layer(x), first)
