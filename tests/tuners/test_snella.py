"""SNELLA's settings, start and sparsity, and parity of whole layers with the public code."""

import functools
import math
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from snell_diffusion.core import kept_count
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import SnellaConfig, delta_layers, delta_parameters, param_groups
from snell_diffusion.tuners.snella import SnellaLayer, fresh_factors
from tests.golden.cases import Case, cases

PAPER, DIFFUSION = SnellaConfig.paper, SnellaConfig.diffusion
IDENTITY = functools.partial(SnellaConfig, sparsify="mask", init="identity", train_beta=False)


def layer_with(config: SnellaConfig, I: int = 24, O: int = 40) -> SnellaLayer:
    base = nn.Linear(I, O, bias=False).requires_grad_(False)
    return SnellaLayer(base, "default", config, key="layer").eval()


# Settings


def test_paper_has_the_public_codes_values():
    config = PAPER()
    assert (config.r, config.heads, config.kernel, config.p) == (32, 2, "mixed", 2.0)
    assert (config.sparsify, config.init, config.scale) == ("squared", "paper", 1.0)
    assert (config.alloc_beta1, config.alloc_beta2, config.alloc_metric) == (0.85, 0.85, "ipt")
    assert config.train_alpha
    assert config.train_gamma
    assert config.train_beta


def test_diffusion_is_the_paper_with_beta_frozen_and_a_scale_and_takes_changes():
    config = DIFFUSION(r=8)
    assert config == PAPER(r=8, train_beta=False, scale=4.0)
    assert DIFFUSION(r=8, train_beta=True, scale=1.0) == PAPER(r=8)
    assert IDENTITY(r=8).max_fresh_update(24, 40) == 0.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 0}, "r must be a whole number, 1 or more, got 0"),
        ({"r": 2.0}, "r must be a whole number, 1 or more, got 2.0"),
        ({"r": True}, "r must be a whole number, 1 or more, got True"),
        ({"heads": 0}, "heads must be a whole number, 1 or more, got 0"),
        ({"r": 5}, r"r must be divisible by heads: r=5 with heads=2 .* set r to 4 or 6"),
        ({"r": 2, "heads": 4}, r"r=2 with heads=4 .* set r to 4 or 4"),
        ({"kernel": "rbf"}, "kernel 'rbf' is unknown; known: mixed, distance, linear"),
        ({"sparsify": "hard"}, "sparsify 'hard' is unknown; known: squared, .*, mask, soft, none"),
        ({"init": "zero"}, "init 'zero' is unknown; known: paper, identity"),
        ({"alloc_metric": "x"}, "alloc_metric 'x' is unknown; known: ipt, mag, w_mag"),
        ({"p": 0.5}, "p must be a number, 1 to 1e6, got 0.5"),
        ({"p": "2"}, "p must be a number, 1 to 1e6, got '2'"),
        ({"kernel": "linear", "p": 1.0}, "kernel 'linear' has no distances: leave p at 2, got 1.0"),
        (
            {"init_sparsity": 1.0},
            "init_sparsity must be a number, 0 or more and below 1, .*got 1.0",
        ),
        ({"target_sparsity": -0.1}, "target_sparsity must be a number, 0 or more .* got -0.1"),
        ({"target_sparsity": math.nan}, "target_sparsity must be a number, .* got nan"),
        (
            {"sparsify": "none", "init_sparsity": 0.1},
            "'none' keeps every entry: init_sparsity must",
        ),
        ({"dropout": 1.0}, "dropout must be a number, 0 or more and below 1, got 1.0"),
        ({"scale": 0.0}, "scale must be a number, 1e-12 to 1e12 or its negative, got 0.0"),
        ({"scale": math.inf}, "scale must be a number, 1e-12 to 1e12 or its negative, got inf"),
        ({"scale": -1e300}, "scale must be a number, 1e-12 to 1e12 or its negative, got -1e"),
        ({"init_sparsity": 1e-40}, "and 1e-12 or more unless it is 0, got 1e-40"),
        ({"p": 1e300}, "p must be a number, 1 to 1e6, got 1e"),
        ({"init_scale": 0}, "init_scale must be a number, above 0, up to 1e12, got 0"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
        ({"train_beta": 1}, "train_beta must be true or false, got 1"),
        ({"alloc_interval": 0}, "alloc_interval must be a whole number, 1 or more, got 0"),
        ({"alloc_init_warmup": -1}, "alloc_init_warmup must be a whole number, 0 or more, got -1"),
        ({"alloc_beta1": 1.0}, "alloc_beta1 must be a number, 0 or more and below 1, got 1.0"),
        ({"target_modules": "to_(q"}, r"'to_\(q' is not a regular expression .* give a list"),
        ({"target_modules": []}, "target_modules must be a list of module names, got"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of module names, got 'head'"),
        (
            {"init": "identity"},
            "needs a rule with a gradient at zero: mask, soft, none; .*'squared'",
        ),
        ({"init": "identity", "sparsify": "mask", "heads": 1}, "must be even .* got 1"),
        (
            {"init": "identity", "sparsify": "mask", "train_alpha": False},
            "the softmax term would never act: use kernel 'distance' or train alpha",
        ),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(SnellaConfigError, match=message):
        PAPER(**changes)


def test_unknown_fields_are_errors():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        PAPER(rank=8)


def test_config_round_trip(tmp_path):
    config = IDENTITY(r=8, target_modules=["b", "a", "a"], seed=5, scale=2.0)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SnellaConfig)
    assert loaded == config
    assert loaded.target_modules == ["a", "b"]
    assert (loaded.peft_type, loaded.peft_type.value) == ("SNELLA", "SNELLA")


# The start


@pytest.mark.parametrize("kernel", ["mixed", "distance", "linear"])
@pytest.mark.parametrize("rule", ["mask", "soft", "none"])
@pytest.mark.parametrize("heads", [2, 4])
def test_identity_is_exactly_zero_with_live_gradients(kernel, rule, heads):
    layer = layer_with(IDENTITY(r=8, heads=heads, kernel=kernel, sparsify=rule, seed=0))
    delta = layer.get_delta_weight("default")
    assert not delta.any()
    (delta * torch.randn(40, 24)).sum().backward()
    A, B = layer.factors("default")
    assert B.grad.abs().max() > 0
    assert (A.grad.abs().max() > 0) == (kernel != "linear")  # as LoRA's: alive after one step


def test_identity_learns_from_a_sparse_level():
    torch.manual_seed(0)
    target = 0.05 * torch.randn(40, 24)
    layer = layer_with(IDENTITY(r=8, init_sparsity=0.5, seed=0))
    optimizer = torch.optim.Adam(layer.delta_params("default"), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (layer.get_delta_weight("default") - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert layer.kept("default") == kept_count(24 * 40, 0.5)


def test_paper_factors_fill_the_stated_box():
    A, B = fresh_factors(PAPER(r=8), 768, 320, torch.Generator().manual_seed(0))
    assert (A.shape, B.shape) == ((2, 768, 4), (2, 320, 4))
    for tensor, bound in ((A, 1 / math.sqrt(768 * 4)), (B, 1 / math.sqrt(320 * 4))):
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert tensor.mean().abs() < 0.05 * bound


@pytest.mark.parametrize("size, r, rms", [((768, 768), 32, 2.7e-6), ((320, 320), 32, 1.2e-5)])
def test_paper_start_is_as_small_as_the_public_codes(size, r, rms):
    layer = layer_with(PAPER(r=r, seed=0), *size)
    delta = layer.get_delta_weight("default").detach()
    assert float(delta.square().mean().sqrt()) == pytest.approx(rms, rel=0.1)
    bound = layer.configs["default"].max_fresh_update(*size)
    assert delta.abs().max() <= bound < 30 * rms
    weight = nn.Linear(*size).weight
    assert delta.norm() / weight.norm() < 1e-3


@pytest.mark.parametrize("kernel", ["mixed", "distance", "linear"])
@pytest.mark.parametrize("rule", ["squared", "printed", "soft", "none"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_fresh_updates_stay_below_the_proven_bound(kernel, rule, p):
    if kernel == "linear" and p != 2.0:
        p = 2.0
    for heads, init_scale in ((1, 1.0), (2, 3.0), (3, 1.0)):
        config = PAPER(
            r=6, heads=heads, kernel=kernel, sparsify=rule, p=p, init_scale=init_scale, scale=-2.0
        )
        bound = config.max_fresh_update(12, 20)
        for seed in range(5):
            config.seed = seed
            delta = layer_with(config, 12, 20).get_delta_weight("default")
            assert delta.abs().max() <= bound


def test_the_start_depends_on_seed_and_path_alone():
    def factors(seed, targets, disturb):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        torch.manual_seed(disturb)
        config = PAPER(r=4, seed=seed, target_modules=targets)
        inject_adapter_in_model(config, model)
        return {name: p.detach() for name, p in delta_parameters(model, "default").items()}

    both = factors(0, ["0", "2"], disturb=1)
    alone = factors(0, ["2"], disturb=2)
    other = factors(1, ["2"], disturb=2)
    assert torch.equal(both["2.snella_A"], alone["2.snella_A"])
    assert not torch.equal(both["0.snella_A"], both["2.snella_A"])
    assert not torch.equal(alone["2.snella_A"], other["2.snella_A"])
    fresh = [factors(None, ["0"], disturb=3)["0.snella_B"] for _ in range(2)]
    assert torch.equal(*fresh)
    assert not torch.equal(fresh[0], factors(None, ["0"], disturb=4)["0.snella_B"])


def test_an_adapter_file_is_the_factors_and_little_else(tmp_path):
    layer = layer_with(IDENTITY(r=32), 320, 640)
    state = {k: v for k, v in layer.state_dict().items() if "snella" in k}
    save_file(state, tmp_path / "adapter.safetensors")
    numbers = 32 * (320 + 640) + 3 + 2 + 2 + 1  # scalars, signs, level as two, threshold
    header = 1200
    assert Path(tmp_path / "adapter.safetensors").stat().st_size < 4 * numbers + header


def test_frozen_scalars_stay_frozen_through_pefts_verbs():
    model = nn.Sequential(nn.Linear(8, 8))
    config = PAPER(r=4, target_modules=["0"], train_beta=False, train_gamma=False)
    peft_model = get_peft_model(model, config)
    layer = peft_model.base_model.model[0]

    def trainable():
        return {name for name, p in layer.named_parameters() if p.requires_grad}

    expected = {"snella_A.default", "snella_B.default", "snella_alpha.default"}
    assert trainable() == expected
    with peft_model.disable_adapter():
        assert not trainable()
    peft_model.set_adapter("default")
    assert trainable() == expected


def test_no_scalars_without_a_softmax():
    layer = layer_with(PAPER(kernel="distance", r=8))
    assert set(layer.state_dict()) == {
        "base_layer.weight",
        *(f"snella_{name}.default" for name in ("A", "B", "signs", "sparsity", "threshold")),
    }


def test_gamma_at_zero_or_below_is_harmless():
    layer = layer_with(PAPER(r=8, seed=0))
    for gamma in (0.0, -1.0):
        with torch.no_grad():
            layer.snella_gamma["default"].fill_(gamma)
        delta = layer.get_delta_weight("default")
        delta.sum().backward()
        assert torch.isfinite(delta).all()
        assert all(torch.isfinite(p.grad).all() for p in layer.delta_params("default"))


# Sparsity


@pytest.mark.parametrize("level", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("rule", ["squared", "mask", "soft"])
def test_a_level_keeps_its_exact_count(level, rule):
    layer = layer_with(PAPER(r=8, sparsify=rule, seed=0))
    layer.set_sparsity("default", level)
    expected = kept_count(24 * 40, level)
    assert layer.sparsity("default") == level
    assert layer.kept("default") == expected
    assert int((layer.get_delta_weight("default") != 0).sum()) == expected
    dense = layer.dense("default").abs()
    limit = layer.current_threshold("default")
    assert int((dense > limit).sum()) == expected


def test_levels_out_of_range():
    layer = layer_with(PAPER(r=8))
    with pytest.raises(ValueError, match=r"sparsity must be 0 \(dense\) to 1, .* got 1.5 for"):
        layer.set_sparsity("default", 1.5)
    with pytest.raises(ValueError, match="has no adapter 'other'; it has: default"):
        layer.set_sparsity("other", 0.5)
    dense = layer_with(PAPER(r=8, sparsify="none"))
    dense.set_sparsity("default", 0.0)
    with pytest.raises(ValueError, match=r"0 with rule 'none'; got 0.5 for .* rule 'none'"):
        dense.set_sparsity("default", 0.5)
    assert dense.kept("default") == 24 * 40


def test_a_stored_threshold_is_used_until_training_goes_on():
    layer = layer_with(PAPER(r=8, seed=0))
    layer.set_sparsity("default", 0.5)
    exact = layer.get_delta_weight("default").detach()
    assert layer.store_threshold("default") == layer.current_threshold("default")
    assert torch.equal(layer.get_delta_weight("default"), exact)
    with torch.no_grad():
        layer.snella_threshold["default"].mul_(1.5)
    assert layer.kept("default") < kept_count(24 * 40, 0.5)
    x = torch.randn(2, 24)
    layer(x)
    assert layer.kept("default") < kept_count(24 * 40, 0.5)
    layer.train()(x).sum().backward()
    assert layer.kept("default") == kept_count(24 * 40, 0.5)
    layer.store_threshold("default")
    layer.set_sparsity("default", 0.25)
    assert math.isnan(layer.snella_threshold["default"])


def test_the_level_is_exact_through_casts_and_files(tmp_path):
    level = 1 - 123_457 / 589_824  # not a float32 number
    layer = layer_with(PAPER(r=8))
    layer.set_sparsity("default", level)
    layer.half().float().to(torch.bfloat16)
    assert layer.sparsity("default") == level
    other = layer_with(PAPER(r=8))
    other.load_state_dict(layer.state_dict())
    assert other.sparsity("default") == level


# Parity with the public code (numbers and their origin: tests/golden/README.md)

SETTINGS = {
    "klora": {"kernel": "distance", "sparsify": "none"},
    "mixk": {"kernel": "mixed", "sparsify": "none"},
    "snell": {"kernel": "distance", "sparsify": "squared"},
    "snella": {"kernel": "mixed", "sparsify": "squared"},
}


def golden_config(case: Case) -> SnellaConfig:
    config = case.config
    return PAPER(
        r=config["rank"],
        heads=config["heads"],
        p=config.get("p", 2.0),
        init_sparsity=config["sparsity"] or 0.0,
        **SETTINGS[case.method],
    )


def set_factors(layer: SnellaLayer, tensors: dict[str, torch.Tensor], prefix="", suffix=""):
    with torch.no_grad():
        for name in layer.adapter_layer_names:
            container = getattr(layer, name)
            if "default" in container:
                key = f"{prefix}{name.removeprefix('snella_')}{suffix}"
                container["default"].copy_(tensors[key])


@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize("case", cases("layer"), ids=str)
def test_golden_layer(case: Case, precision: str):
    t, sizes = case.tensors(precision), (case.config["in_features"], case.config["out_features"])
    layer = layer_with(golden_config(case), *sizes)
    nn.init.zeros_(layer.base_layer.weight)
    layer = layer.double() if precision == "f64" else layer
    set_factors(layer, t)
    assert torch.equal(layer.snella_signs["default"], t["coeff"].float())
    x = t["x"].requires_grad_()
    y = layer.train()(x)
    y.backward(t["gy"])
    case.assert_close(y, t[f"y.{precision}"], precision, "y")
    case.assert_close(x.grad, t[f"gx.{precision}"], precision, "gx")
    for name in ("A", "B", "alpha", "gamma", "beta"):
        container = getattr(layer, f"snella_{name}")
        if "default" in container:
            want = t[f"g{name}.{precision}"]
            case.assert_close(container["default"].grad, want, precision, f"g{name}")


@pytest.mark.parametrize("case", [c for c in cases("trace") if not c.config["allocator"]], ids=str)
def test_golden_training_trace(case: Case):
    t, config = case.tensors("f64"), case.config
    sizes = (config["din"], config["dh"], config["dout"])
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:]))
    model = get_peft_model(model, golden_config_with_targets(case)).double()
    layers = [layer for _, layer in delta_layers(model)]
    for index, layer in enumerate(layers, start=1):
        set_factors(layer, t, "init.", str(index))
        layer.base_layer.weight.data.copy_(t[f"W{index}"])
        layer.base_layer.bias.data.copy_(t[f"b{index}"])
    groups = param_groups(model, lr=config["lr"], weight_decay=config["weight_decay"])
    optimizer = torch.optim.AdamW(groups)
    for step in range(config["steps"]):
        loss = nn.functional.mse_loss(model(t["X"]), t["Y"])
        case.assert_close(loss, t["loss.f64"][step], "f64", f"loss {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for index, layer in enumerate(layers, start=1):
            for name, container in layer.containers():
                key = f"hist.{name.removeprefix('snella_')}{index}.f64"
                if key in t:
                    case.assert_close(container["default"], t[key][step], "f64", f"{key} {step}")


def golden_config_with_targets(case: Case) -> SnellaConfig:
    config = golden_config(case)
    config.target_modules = ["0", "2"]
    return config
