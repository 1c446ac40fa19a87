"""One layer alone: scale, merge, cache, dropout, precision, and the bases that cannot be folded."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from snell_diffusion.tuners import SnellaConfig, delta_layers
from snell_diffusion.tuners.snella import SnellaLayer

I, O = 24, 40


def layer_on(base: nn.Module | None = None, name="default", seed=0, **changes) -> SnellaLayer:
    torch.manual_seed(7)
    base = nn.Linear(I, O) if base is None else base
    config = SnellaConfig.paper(**{"r": 8, "seed": seed, **changes})
    layer = SnellaLayer(base.requires_grad_(False), name, config, key="layer").eval()
    stir(layer, name)
    return layer


def stir(layer: SnellaLayer, name="default", size=0.2, seed=3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.delta_params(name):
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, I, generator=torch.Generator().manual_seed(1))


def evaluate(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


# Scale


def test_scale_multiplies_the_update(x):
    layer = layer_on(scale=0.5)
    full = layer.get_delta_weight("default") / 0.5
    layer.set_scale("default", 3.0)
    assert layer.scaling == {"default": 1.5}
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * full)
    layer.set_scale("someone else", 9.0)
    assert layer.scaling == {"default": 1.5}


def test_call_time_scale_is_undone_exactly():
    layer = layer_on(scale=0.7)
    layer.set_scale("default", 0.3)
    before = layer.scaling["default"]
    layer.scale_layer(0.1)
    layer.scale_layer(0.3)
    assert layer.scaling["default"] == pytest.approx(0.7 * 0.3 * 0.1 * 0.3)
    layer.unscale_layer(0.3)
    layer.unscale_layer(0.1)
    assert layer.scaling["default"] == before
    layer.scale_layer(0.9)
    layer.unscale_layer()
    assert layer.scaling["default"] == before


def test_a_call_at_scale_zero_does_not_lose_the_weight(x):
    layer = layer_on()
    layer.set_scale("default", 0.8)
    layer.scale_layer(0.0)
    assert torch.equal(evaluate(layer, x), evaluate(layer.base_layer, x))
    layer.set_scale("default", 1.0)  # what diffusers does after a call at 0
    assert layer.scaling["default"] == 0.8
    layer.set_scale("default", 0.6)
    assert layer.scaling["default"] == 0.6


# Merge


def test_merge_is_the_float32_sum_and_reports_what_rounding_lost():
    layer = layer_on(nn.Linear(I, O).to(torch.bfloat16))
    original = layer.weight.clone()
    delta = layer.get_delta_weight("default").detach()
    layer.merge()
    assert torch.equal(layer.weight, (original.float() + delta).bfloat16())
    lost = (layer.weight.float() - original.float() - delta).norm() / delta.norm()
    assert layer.merge_error["default"] == pytest.approx(float(lost), rel=1e-5)
    assert 0 < lost < 1
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    assert layer.merge_error == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_unmerge_restores_every_bit(dtype):
    layer = layer_on(nn.Linear(I, O).to(dtype))
    original = layer.weight.clone()
    for _ in range(3):
        layer.merge()
        assert not torch.equal(layer.weight, original)
        layer.unmerge()
        assert torch.equal(layer.weight, original)


def test_merging_adapters_one_after_the_other():
    layer = layer_on()
    original = layer.weight.clone()
    layer.update_layer("second", SnellaConfig.paper(r=4, seed=1), "layer")
    stir(layer, "second")
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    torch.testing.assert_close(layer.weight, original + deltas[0] + deltas[1])
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    with pytest.warns(UserWarning, match="nothing is merged into this layer"):
        layer.unmerge()


def test_safe_merge_refuses_before_anything_is_written():
    layer = layer_on()
    original = layer.weight.clone()
    with torch.no_grad():
        layer.snella_A["default"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"would write NaN or infinite values .* nothing was"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, original)
    assert not layer.merged


def test_safe_merge_of_a_model_is_all_or_nothing(mlp_family):
    model = get_peft_model(mlp_family.model(), SnellaConfig.paper(r=8, target_modules=["0", "2"]))
    first = model.base_model.model[0].weight.clone()
    with torch.no_grad():
        model.base_model.model[2].snella_B["default"].fill_(torch.inf)
    with pytest.raises(ValueError, match="merging adapter"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model[0].weight, first)
    assert not any(layer.merged for _, layer in delta_layers(model))


def test_merging_into_16_bits_warns_how_much_was_lost(mlp_family):
    config = SnellaConfig.paper(r=8, seed=0, target_modules=["0", "2"], scale=0.1)
    model = get_peft_model(mlp_family.model().to(torch.bfloat16), config)
    message = r"lost part of the update in 2 of 2 layers.* off by \d+% .* in float32"
    with pytest.warns(UserWarning, match=message):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_merging_next_to_another_tuner_survives_any_order_of_unmerging(x):
    for lora_outside in (True, False):
        model = nn.Sequential(nn.Linear(I, O).requires_grad_(False))
        original = model[0].weight.clone()
        lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        snella = SnellaConfig.paper(r=8, seed=0, target_modules=["0"])
        configs = [("snella", snella), ("lora", lora)]
        for name, config in configs if lora_outside else configs[::-1]:
            inject_adapter_in_model(config, model, name)
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.set_adapter(["snella", "lora"])
        stir(next(delta_layers(model))[1], "snella")
        unmerged = evaluate(model.eval(), x)
        tuners = [module for module in model.modules() if hasattr(module, "base_layer")]
        for order in (tuners, tuners[::-1]):
            for tuner in order:
                tuner.merge()
            torch.testing.assert_close(evaluate(model, x), unmerged)
            for tuner in order:
                tuner.unmerge()
            torch.testing.assert_close(tuners[0].get_base_layer().weight, original)
            torch.testing.assert_close(evaluate(model, x), unmerged)


def test_disabling_a_merged_layer_gives_the_base_back(x):
    layer = layer_on()
    base = evaluate(layer.base_layer, x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(evaluate(layer, x), base)


def test_a_merged_adapter_cannot_be_deleted():
    layer = layer_on()
    layer.merge()
    with pytest.raises(ValueError, match="'default' is merged: unmerge it before"):
        layer.delete_adapter("default")


class PackedLinear(nn.Linear):
    """Stands in for quantized Linears: the weight is not the matrix it multiplies by."""

    def __init__(self) -> None:
        super().__init__(I, O)
        self.dense = self.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense, self.bias)


def test_a_packed_base_runs_unmerged_and_refuses_to_merge(x):
    layer = layer_on(PackedLinear())
    expected = F.linear(x, layer.base_layer.dense + layer.get_delta_weight("default"), layer.bias)
    torch.testing.assert_close(evaluate(layer, x), expected.detach())
    with pytest.raises(ValueError, match=r"cannot merge .* PackedLinear .* dtype torch.uint8"):
        layer.merge()


# Cache


def test_the_update_is_cached_until_something_changes(x):
    layer = layer_on()
    calls = []
    build = layer.delta_fn

    def counted(adapter):
        fn = build(adapter)

        def run(*tensors):
            calls.append(adapter)
            return fn(*tensors)

        return run

    layer.delta_fn = counted
    evaluate(layer, x)
    evaluate(layer, x)
    assert len(calls) == 1
    changes = [
        lambda: stir(layer),
        lambda: layer.set_sparsity("default", 0.5),
        lambda: layer.set_scale("default", 0.5),
        lambda: layer.store_threshold("default"),
        lambda: layer.load_state_dict(layer.state_dict()),
    ]
    for change in changes:
        change()
        calls.clear()
        cached = [evaluate(layer, x), evaluate(layer, x)]
        assert len(calls) == 1
        layer.cache_in_eval = False
        assert torch.equal(cached[0], evaluate(layer, x))
        assert torch.equal(cached[1], evaluate(layer, x))
        assert len(calls) == 3
        layer.cache_in_eval = True


def test_casting_the_model_drops_the_cache(x):
    layer = layer_on()
    evaluate(layer, x)
    layer.double()
    with torch.no_grad():
        expected = F.linear(
            x.double(), layer.weight + layer.get_delta_weight("default"), layer.bias
        )
    assert torch.equal(evaluate(layer, x.double()), expected)


def test_changing_the_base_weight_is_seen_at_once(x):
    layer = layer_on()
    evaluate(layer, x)
    with torch.no_grad():
        layer.base_layer.weight.mul_(2.0)
    expected = F.linear(x, layer.weight + layer.get_delta_weight("default"), layer.bias)
    assert torch.equal(evaluate(layer, x), expected.detach())


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_steps_between_evaluations_are_seen(x, fused):
    layer = layer_on()
    optimizer = torch.optim.AdamW(layer.delta_params("default"), lr=1e-2, fused=fused)
    layer(x).sum().backward()
    before = evaluate(layer, x)
    optimizer.step()  # the fused one changes parameters without counting it
    after = evaluate(layer, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x).detach())


def test_writing_through_data_is_seen_while_training(x):
    layer = layer_on(kernel="linear")
    before = evaluate(layer, x)
    for value in (1.0, 2.0):  # an even number of entries changes alike
        layer.snella_A["default"].data.fill_(value)
        after = evaluate(layer, x)
        assert not torch.equal(after, before)
        before = after


def test_writing_through_data_of_frozen_parameters_needs_clear_cache(x):
    layer = layer_on().requires_grad_(False)
    before = evaluate(layer, x)
    layer.snella_A["default"].data.mul_(3.0)
    layer.clear_cache()
    after = evaluate(layer, x)
    assert not torch.equal(after, before)
    layer.snella_A["default"].data.div_(3.0)
    layer.eval()
    assert not torch.equal(evaluate(layer, x), after)


def test_inference_mode_then_training(x):
    layer = layer_on()
    expected = evaluate(layer, x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer.train()(x).sum().backward()
    assert layer.snella_A["default"].grad is not None


# Training


def test_gradients_are_those_of_the_plain_formula(x):
    layer = layer_on().train()
    plain = deepcopy(layer)
    y = layer(x)
    expected = F.linear(x, plain.weight + plain.get_delta_weight("default"), plain.bias)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(
        layer.delta_params("default"), plain.delta_params("default"), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(x, reentrant):
    layer = layer_on().train()
    layer(x).square().sum().backward()
    plain = layer.snella_A["default"].grad.clone()
    layer.zero_grad()
    checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.snella_A["default"].grad, plain)


def test_dropout_acts_on_the_updates_input_in_training_only(x):
    layer = layer_on(dropout=0.5)
    without = layer_on()
    assert torch.equal(evaluate(layer, x), evaluate(without, x))
    layer.train()
    torch.manual_seed(0)
    y = evaluate(layer, x)
    torch.manual_seed(0)
    dropped = F.linear(F.dropout(x, 0.5), layer.get_delta_weight("default"))
    torch.testing.assert_close(y, evaluate(layer.base_layer, x) + dropped.detach())
    layer(x).sum().backward()
    assert layer.snella_B["default"].grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_does_not_swallow_small_updates(x, dtype):
    base = nn.Linear(I, O, bias=False)
    nn.init.constant_(base.weight, 1.0)
    layer = layer_on(base.to(dtype), scale=1e-3).train()
    half = x[..., : I // 2].to(dtype)
    x = torch.cat([half, -half], -1)  # rows add up to 0, so the base answers 0
    change = (layer(x) - layer.base_layer(x)).float()
    exact = F.linear(x.float(), layer.get_delta_weight("default"))
    assert (change - exact).norm() < 0.02 * exact.norm()
    layer.fold_16bit = True
    assert torch.equal(layer(x), layer.base_layer(x))  # below half a unit of 1.0's last place
    layer.fold_16bit = False
    layer(x).float().square().sum().backward()
    assert layer.snella_A["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_identity_changes_no_bit_in_any_precision(x, dtype):
    config = SnellaConfig(r=8, seed=0, init="identity", sparsify="mask")
    base = nn.Linear(I, O).to(dtype).requires_grad_(False)
    layer = SnellaLayer(base, "default", config, "layer")
    x = x.to(dtype)
    assert torch.equal(layer.train()(x), base(x))
    assert torch.equal(evaluate(layer.eval(), x), base(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.train()(x), base(x))


def test_autocast_keeps_the_update_in_full_precision(x):
    layer = layer_on().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.snella_A["default"].grad.dtype == torch.float32


def test_double_precision_reaches_the_factors(x):
    layer = layer_on().double()
    assert layer.get_delta_weight("default").dtype == torch.float64
    assert evaluate(layer, x.double()).dtype == torch.float64


def test_hooks_of_the_base_layer_still_run(x):
    layer = layer_on()
    before = evaluate(layer, x)
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1.0)
    torch.testing.assert_close(evaluate(layer, x), before + 1.0)


def test_offloaded_to_the_cpu_by_accelerate(x):
    model = nn.Sequential(layer_on())
    expected = evaluate(model, x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].snella_A["default"].is_meta
    for _ in range(2):
        torch.testing.assert_close(evaluate(model, x), expected)
    assert model[0].snella_A["default"].is_meta


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(x, training):
    layer = layer_on().train(training)
    expected = layer(x).detach()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), expected)
    layer.set_sparsity("default", 0.6)
    torch.testing.assert_close(compiled(x).detach(), layer(x).detach())


# Adapters


@pytest.mark.parametrize("name", ["", "a.b", "keys", "weight.x"])
def test_names_that_cannot_be_used(name):
    with pytest.raises(ValueError, match=r"adapter name .* cannot be used: it must not be empty"):
        layer_on(name=name)


@pytest.mark.parametrize("name", ["unet", "snella_A", "default_0", "weight", "A-1"])
def test_names_that_can(name, mlp_family, tmp_path):
    model = get_peft_model(
        mlp_family.model(), SnellaConfig.paper(r=8, target_modules=["0"]), adapter_name=name
    )
    stir(model.base_model.model[0], name)
    expected = mlp_family.run(model.eval())
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    folder = tmp_path / name
    loaded = PeftModel.from_pretrained(mlp_family.model(), folder, adapter_name=name).eval()
    assert torch.equal(mlp_family.run(loaded), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_a_fresh_layer_is_in_its_bases_mode(mode):
    base = nn.Linear(I, O).train(mode)
    assert SnellaLayer(base, "default", SnellaConfig.paper(r=8), "layer").training is mode


def test_an_adapter_name_is_used_once():
    layer = layer_on()
    with pytest.raises(ValueError, match="'default' already exists in this layer"):
        layer.update_layer("default", SnellaConfig.paper(), "layer")


def test_other_layers_cannot_be_adapted():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(4, 4))
    expected = r"wraps nn\.Linear or nn\.Conv2d, but target module '0' is Conv1d"
    with pytest.raises(TypeError, match=expected):
        get_peft_model(model, SnellaConfig.paper(target_modules=["0"]))


def test_deleting_the_last_adapter_leaves_the_base(x):
    layer = layer_on()
    evaluate(layer, x)
    layer.delete_adapter("default")
    assert torch.equal(evaluate(layer, x), evaluate(layer.base_layer, x))
    assert not layer.configs
    assert not layer.scaling
