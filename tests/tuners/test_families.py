"""What every method must do in every model family, through the verbs of PEFT and diffusers."""

import functools
from copy import deepcopy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from snell_diffusion.tuners import METHODS, SnellaConfig, delta_layers, delta_parameters

pytestmark = [
    # PEFT says so for every second adapter, transformers whenever PEFT wraps one of its models.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

PAPER = SnellaConfig.paper
IDENTITY = functools.partial(SnellaConfig, sparsify="mask", init="identity", train_beta=False)


def targets(family, **changes):
    if family.name == "mlp":
        changes["target_modules"] = ["0", "2"]
    return {"r": 8, "seed": 0, **changes}


def adapted(family, make=PAPER, adapter="default", **changes):
    """The family's model with a fresh adapter, in the way diffusers and transformers do it."""
    model = family.model()
    inject_adapter_in_model(make(**targets(family, **changes)), model, adapter)
    return model.eval()


def train_a_little(model: nn.Module, adapter: str = "default", seed: int = 2) -> None:
    """Move an adapter's parameters to values that change outputs by a few per cent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta_parameters(model, adapter).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def run(family, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return family.run(model)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "snella" not in name
    }


def assert_equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:  # a threshold that is not stored is NaN
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, equal_nan=True)


def test_snella_is_found_by_its_file():
    assert METHODS["SNELLA"].config is SnellaConfig


def test_identity_start_changes_no_bit_and_has_live_gradients(family):
    model = adapted(family, IDENTITY)
    assert torch.equal(run(family, model), run(family, family.base))
    assert torch.equal(family.run(model.train()), family.run(family.model().train()))
    full = family.model().requires_grad_(True)
    family.run(model).square().sum().backward()
    family.run(full).square().sum().backward()
    used = [path for path, _ in delta_layers(model) if full.get_submodule(path).weight.grad.any()]
    assert used  # the last block of SD 3 does not use all of its projections
    gradients = {name: p.grad for name, p in delta_parameters(model, "default").items()}
    for path in used:
        assert gradients[f"{path}.snella_A"].abs().max() > 0, path
        assert gradients[f"{path}.snella_B"].abs().max() > 0, path


def test_paper_start_stays_within_its_stated_bound(family):
    model = adapted(family)
    for name, layer in delta_layers(model):
        config = layer.configs["default"]
        bound = config.max_fresh_update(layer.in_features, layer.out_features)
        assert 0 < layer.get_delta_weight("default").abs().max() <= bound, name


@pytest.mark.parametrize("make", [PAPER, IDENTITY])
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(family, make):
    model = adapted(family, make)
    train_a_little(model)
    before, unmerged = base_state(model), run(family, model)
    assert not torch.equal(unmerged, run(family, family.base))
    for _, layer in delta_layers(model):
        layer.merge(safe_merge=True)
    assert torch.equal(run(family, model), unmerged)
    for _, layer in delta_layers(model):
        layer.unmerge()
    assert_equal_states(base_state(model), before)
    assert torch.equal(run(family, model), unmerged)


def test_training_and_evaluation_compute_the_same(family):
    model = adapted(family)
    train_a_little(model)
    evaluated = run(family, model)
    assert torch.equal(family.run(model).detach(), evaluated)
    assert torch.equal(run(family, model), evaluated)  # the second time from the cache


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_state_dict_round_trip(family, low_cpu_mem_usage):
    model = adapted(family)
    train_a_little(model)
    for index, (_, layer) in enumerate(delta_layers(model)):
        layer.set_sparsity("default", 0.1 + 0.01 * index)
    state = get_peft_model_state_dict(model)
    loaded = family.model()
    config = PAPER(**targets(family, seed=9))
    inject_adapter_in_model(config, loaded, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(
        loaded, state, adapter_name="again", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not result.unexpected_keys
    assert torch.equal(run(family, loaded.eval()), run(family, model))
    for (_, old), (_, new) in zip(delta_layers(model), delta_layers(loaded), strict=True):
        assert new.sparsity("again") == old.sparsity("default")


def test_state_dict_keys(family):
    model = adapted(family)
    expected = {
        f"{path}.snella_{name}"
        for path, _ in delta_layers(model)
        for name in ("A", "B", "alpha", "gamma", "beta", "signs", "sparsity", "threshold")
    }
    assert set(get_peft_model_state_dict(model)) == expected


def test_only_the_adapter_trains(family):
    model = adapted(family)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".snella_" in name for name in trainable)
    rank_numbers = sum(
        8 * (layer.in_features + layer.out_features) + 3 for _, layer in delta_layers(model)
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == rank_numbers


def test_two_adapters_add_and_switch(family):
    model = adapted(family)
    inject_adapter_in_model(IDENTITY(**targets(family, r=4)), model, "second")
    train_a_little(model, "default", seed=2)
    train_a_little(model, "second", seed=3)
    layers = [layer for _, layer in delta_layers(model)]
    for layer in layers:
        layer.set_adapter(["default", "second"])
    both = run(family, model)
    summed = family.model()
    with torch.no_grad():
        for path, layer in delta_layers(model):
            delta = layer.get_delta_weight("default") + layer.get_delta_weight("second")
            summed.get_submodule(path).weight += delta
    assert torch.equal(both, run(family, summed))
    for layer in layers:
        layer.set_adapter("default")
    alone = run(family, model)
    for layer in layers:
        layer.delete_adapter("second")
    assert torch.equal(run(family, model), alone)
    assert not any("second" in name for name in model.state_dict())


def test_disabling_gives_the_base_model_back(family):
    model = adapted(family)
    train_a_little(model)
    changed = run(family, model)
    for _, layer in delta_layers(model):
        layer.enable_adapters(False)
    assert torch.equal(run(family, model), run(family, family.base))
    for _, layer in delta_layers(model):
        layer.enable_adapters(True)
    assert torch.equal(run(family, model), changed)


def test_deepcopy_is_independent(family):
    model = adapted(family)
    train_a_little(model)
    before = run(family, model)
    copy = deepcopy(model)
    assert torch.equal(run(family, copy), before)
    train_a_little(copy, seed=5)
    assert not torch.equal(run(family, copy), before)
    assert torch.equal(run(family, model), before)


def test_casting_the_model_keeps_the_factors(family):
    model = adapted(family)
    tensors = {name: p.clone() for name, p in delta_parameters(model, "default").items()}
    model.to(torch.bfloat16)
    for name, parameter in delta_parameters(model, "default").items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tensors[name]), name
    for _, layer in delta_layers(model):
        assert layer.weight.dtype == torch.bfloat16
        assert layer.snella_sparsity["default"].dtype == torch.float64
        assert layer.snella_signs["default"].dtype == torch.float32


def test_lora_on_the_same_layers_in_either_order(family):
    names = [path for path, _ in delta_layers(adapted(family))]
    lora = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    outputs, states = [], []
    for snella_first in (True, False):
        torch.manual_seed(1)
        model = family.model()
        order = [("ours", PAPER(**targets(family))), ("lora", lora)]
        for name, config in order if snella_first else order[::-1]:
            inject_adapter_in_model(config, model, name)
        fill_lora(model)
        train_a_little(model, "ours")
        for module in model.modules():
            if hasattr(module, "set_adapter") and hasattr(module, "base_layer"):
                module.set_adapter(["ours", "lora"])
        outputs.append(run(family, model.eval()))
        states.append(get_peft_model_state_dict(model, adapter_name="ours"))
        assert [path for path, _ in delta_layers(model)] == names
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert_equal_states(*states)
    assert not any("base_layer" in key for key in states[0])


def fill_lora(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in sorted(
            (name.replace(".base_layer", ""), p) for name, p in model.named_parameters()
        ):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", ["clip_text", "vit", "mlp"], indirect=True)
def test_peft_model_saves_loads_and_unloads(family, tmp_path):
    model = get_peft_model(family.model(), PAPER(**targets(family)))
    train_a_little(model)
    model.eval().save_pretrained(tmp_path)
    empty = PeftModel.from_pretrained(family.model(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(run(family, empty), run(family, model))
    loaded = PeftModel.from_pretrained(family.model(), tmp_path).eval()
    assert torch.equal(run(family, loaded), run(family, model))
    merged = loaded.merge_and_unload(safe_merge=True)
    assert not list(delta_layers(merged))
    assert torch.equal(run(family, merged), run(family, model))
