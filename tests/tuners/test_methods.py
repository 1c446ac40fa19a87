"""Properties of every method of the folder, on a vision transformer and a UNet; PEFT's beside them.

A new file of `snell_diffusion/tuners/` with a METHOD is tested here the day it appears; how its
fresh adapter starts has to be entered in STARTS.
"""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import METHODS, DeltaLayer, delta_layers, delta_parameters
from snell_diffusion.tuners.base import default_targets
from snell_diffusion.tuners.recipes import RECIPES, recipe
from tests.tuners.conftest import Family, family_named, randn

OURS = sorted(name.lower() for name in METHODS)
PEFTS = sorted(name for name, found in RECIPES.items() if not found.ours and not found.trains_base)
UNMERGEABLE = ("binary_adapter", "spt_adapter")
LINEAR_ONLY = {  # how the message begins that refuses a convolution
    "arc": "ARC recomposes the features of tokens after a layer norm",
    "binary_adapter": "Bi-AdaptFormer adds to the output of an MLP's Linear",
    "spt_adapter": "SPT_ADAPTER tunes Linear layers and norms",
    "spt_lora": "SPT_LORA tunes Linear layers and norms",
}
STARTS = {  # largest change of the model's output by a fresh adapter, of the output's size
    **dict.fromkeys(("hta", "spt_lora", "spt_adapter"), 0.0),
    **dict.fromkeys(("snell", "snella"), 0.1),
    **dict.fromkeys(("klora", "mixk"), 0.5),
    **dict.fromkeys(("binary_lora", "binary_adapter"), 1e-2),
    "arc": 0.5,  # its MLP position; attention starts as the identity
    **dict.fromkeys(PEFTS, 0.0),
}
METHOD = pytest.mark.parametrize("name", OURS)
MODEL = pytest.mark.parametrize("model_name", ["vit", "unet_sd15"])


def config_of(name: str, model: nn.Module, seed: int = 0, **settings):
    found = recipe(name)
    if "rank" in found.settings:
        settings = {"rank": 8, **settings}
    return found.config(settings, default_targets(model), seed, "vision", steps=50)


def adapted(name: str, family: Family, adapter: str = "default", **settings) -> nn.Module:
    model = family.model()
    return inject_adapter_in_model(config_of(name, model, **settings), model, adapter).eval()


def stir(model: nn.Module, adapter: str = "default", size: float = 0.05, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta_parameters(model, adapter).values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def run(family: Family, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return family.run(model)


def loss_of(family: Family, model: nn.Module) -> Tensor:
    y = family.run(model)
    return (y - randn(*y.shape, seed=9)).square().mean()


def apart(got: Tensor, base: Tensor) -> float:
    return float((got - base).abs().max() / base.abs().max())


def test_every_method_says_how_it_starts():
    assert set(STARTS) == {*OURS, *PEFTS}


@MODEL
@METHOD
def test_start(name, model_name):
    family = family_named(model_name)
    change = apart(run(family, adapted(name, family)), family.run(family.base))
    assert change < max(STARTS[name], 1e-5)  # another order of the same additions
    if model_name == "vit":  # a UNet's usual targets have no MLP, which is where ARC starts
        assert (change > 1e-5) == (STARTS[name] > 0)


@MODEL
@METHOD
def test_trains(name, model_name):
    family = family_named(model_name)
    model = adapted(name, family).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    mine = {id(p) for p in delta_parameters(model, "default").values()}
    assert {id(p) for p in trained.values()} <= mine
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=1e-15, weight_decay=0.0)
    losses, alive = [], set()
    for _ in range(4):
        torch.manual_seed(0)
        loss = loss_of(family, model)
        loss.backward()
        losses.append(float(loss.detach()))
        alive |= {n for n, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert alive == set(trained)


@MODEL
@METHOD
def test_merged_is_unmerged(name, model_name):
    family = family_named(model_name)
    model = adapted(name, family)
    stir(model)
    layers = [layer for _, layer in delta_layers(model)]
    if name in UNMERGEABLE:
        with pytest.raises(ValueError, match=r"cannot be merged: .* use the adapter unmerged, or"):
            layers[0].merge()
        return
    before = {n: t.clone() for n, t in model.state_dict().items()}
    unmerged, base = run(family, model), run(family, family.base)
    assert apart(unmerged, base) > 1e-5
    for layer in layers:
        layer.merge(safe_merge=True)
    torch.testing.assert_close(run(family, model), unmerged, rtol=1e-3, atol=1e-4)
    for layer in layers:
        layer.unmerge()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


@METHOD
def test_scale_zero_disabling_and_deleting_give_the_base(name):
    family = family_named("vit")
    model = adapted(name, family)
    stir(model)
    base, changed = run(family, family.base), run(family, model)
    assert apart(changed, base) > 1e-5

    def each(act) -> None:
        for _, layer in delta_layers(model):
            act(layer)

    each(lambda layer: layer.set_scale("default", 0.0))
    assert torch.equal(run(family, model), base)
    each(lambda layer: layer.set_scale("default", 1.0))
    assert torch.equal(run(family, model), changed)
    each(lambda layer: layer.enable_adapters(False))
    assert torch.equal(run(family, model), base)
    each(lambda layer: layer.enable_adapters(True))
    assert torch.equal(run(family, model), changed)
    each(lambda layer: layer.delete_adapter("default"))
    assert torch.equal(run(family, model), base)
    assert not dict(delta_parameters(model, "default"))


@METHOD
def test_scale_multiplies_what_a_layer_adds(name):
    family = family_named("vit")
    model = adapted(name, family)
    stir(model)
    for _, layer in delta_layers(model):
        x = randn(2, 5, layer.in_features)
        base, once = layer.base_layer(x), call(layer, x)
        layer.set_scale("default", 2.5)
        torch.testing.assert_close(call(layer, x) - base, 2.5 * (once - base), rtol=1e-3, atol=1e-5)


def call(layer: DeltaLayer, x: Tensor) -> Tensor:
    """A layer alone; what Bi-AdaptFormer's reads of the block is given."""
    if getattr(layer, "seen", None) is not None:
        layer.seen.x = randn(*x.shape[:-1], layer.out_features, seed=4)
    with torch.no_grad():
        return layer(x)


@METHOD
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_two_adapters_add(name):
    family = family_named("vit")
    model = adapted(name, family, "first")
    inject_adapter_in_model(config_of(name, family.base, seed=1), model, "second")
    for seed, adapter in enumerate(("first", "second")):
        stir(model, adapter, seed=seed)
    for path, layer in delta_layers(model.eval()):
        x = randn(2, 5, layer.in_features)
        base, added = layer.base_layer(x), []
        for active in ("first", "second", ["first", "second"]):
            layer.set_adapter(active)
            added.append(call(layer, x) - base)
        torch.testing.assert_close(added[2], added[0] + added[1], rtol=1e-3, atol=1e-5, msg=path)


@METHOD
def test_copies_are_whole_and_apart(name):
    family = family_named("vit")
    model = adapted(name, family)
    stir(model)
    expected = run(family, model)
    copy = deepcopy(model)
    assert torch.equal(run(family, copy), expected)
    stir(copy, seed=8)
    assert not torch.equal(run(family, copy), expected)
    assert torch.equal(run(family, model), expected)


@METHOD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_keeps_float32_adapters(name, dtype):
    family = family_named("vit")
    model = adapted(name, family)
    stir(model)
    expected = run(family, model)
    model = model.to(dtype)
    assert all(p.dtype == torch.float32 for p in delta_parameters(model, "default").values())
    inputs = {"pixel_values": randn(1, 3, 16, 16).to(dtype)}
    y = model.train()(**inputs)[0]
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    gradients = [p.grad for p in delta_parameters(model, "default").values() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs)[0].float(), expected, rtol=0.1, atol=0.1)


@METHOD
def test_the_seed_decides(name):
    family = family_named("vit")

    def fresh(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 100)
        return delta_parameters(adapted(name, family, seed=seed), "default")

    first, again, other = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@METHOD
def test_checkpointed_blocks_have_the_same_gradients(name):
    family = family_named("vit")
    model = adapted(name, family)
    stir(model)
    model.train()
    loss_of(family, model).backward()
    parameters = delta_parameters(model, "default")
    expected = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    model.zero_grad()
    for block in model.layers:
        forward = block.forward
        block.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
    loss_of(family, model).backward()
    for n, gradient in expected.items():
        torch.testing.assert_close(parameters[n].grad, gradient, rtol=1e-4, atol=1e-7, msg=n)


@pytest.mark.parametrize("name", [n for n in OURS if METHODS[n.upper()].stored_as == n != "snella"])
def test_compiles_without_graph_breaks(name):  # SNELLA and its settings do in test_layer.py
    family = family_named("vit")
    model = adapted(name, family).train()
    stir(model)
    block = model.layers[0] if name == "binary_adapter" else next(delta_layers(model))[1]
    x = randn(2, 5, 32)
    expected = block(x)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


@METHOD
def test_convolutions_work_or_are_refused(name):
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).requires_grad_(False).eval()
    found = recipe(name)
    settings = {"rank": 8} if "rank" in found.settings else {}
    config = found.config(settings, ["0"], 0, chosen=True)
    if name in LINEAR_ONLY:
        with pytest.raises(ValueError, match=r"target module '0' is a convolution: leave it out"):
            inject_adapter_in_model(config, base)
        return
    x = randn(2, 4, 5, 5)
    model = inject_adapter_in_model(config, deepcopy(base)).eval()
    stir(model)
    with torch.no_grad():
        unmerged = model(x)
        assert apart(unmerged, base(x)) > 1e-5
        model[0].merge()
        torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "inside a LoRA layer"])
@pytest.mark.parametrize("name", LINEAR_ONLY)
def test_a_refused_convolution_is_named_with_the_reason(name, wrapped):
    block = nn.ModuleDict({"norm2": nn.LayerNorm(4), "fc2": nn.Conv2d(4, 4, 1)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    if wrapped:
        inject_adapter_in_model(LoraConfig(target_modules=["fc2"]), model, "lora")
        del model.peft_config
    with pytest.raises(SnellaConfigError) as error:
        inject_adapter_in_model(recipe(name).config({}, ["fc2"], 0, chosen=True), model)
    assert str(error.value) == (
        f"{LINEAR_ONLY[name]}, and target module 'blocks.0.fc2' is a convolution: leave it out of "
        "target_modules"
    )


# PEFT's


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_methods_of_peft_start_as_the_base_train_and_merge(name):
    family = family_named("vit")
    model = adapted(name, family)
    base = run(family, family.base)
    assert apart(run(family, model), base) < 1e-5
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(6):
        loss = loss_of(family, model.train())
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    unmerged = run(family, model.eval())
    assert apart(unmerged, base) > 1e-4
    for module in list(model.modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
    torch.testing.assert_close(run(family, model), unmerged, rtol=1e-3, atol=1e-4)
