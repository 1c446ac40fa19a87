"""How targets are chosen, and what the model class adds to PEFT's."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import SnellaConfig, delta_layers
from snell_diffusion.tuners.base import default_targets

CONFIG = SnellaConfig.paper


def adapted_paths(model, **changes):
    inject_adapter_in_model(CONFIG(r=4, **changes), model)
    return [path for path, _ in delta_layers(model)]


def test_default_targets_by_family(family):
    if family.name == "mlp":
        message = r"target_modules is not set and Sequential .* set target_modules .* example 0, 2"
        with pytest.raises(SnellaConfigError, match=message):
            default_targets(family.base)
        return
    expected = {
        "unet_sd15": {"to_q", "to_k", "to_v", "to_out.0"},
        "unet_sdxl": {"to_q", "to_k", "to_v", "to_out.0"},
        "clip_text": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        "vit": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
    }
    joint = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    wanted = expected.get(family.name, expected["unet_sd15"] | joint)
    assert set(default_targets(family.base)) == wanted
    assert {
        path.removesuffix(".0").rpartition(".")[2] for path in adapted_paths(family.model())
    } == {name.removesuffix(".0") for name in wanted}


def test_a_model_without_linear_layers():
    with pytest.raises(SnellaConfigError, match="none: it has no Linear layer at all"):
        default_targets(nn.Sequential(nn.ReLU()))


def test_targets_by_name_pattern_and_exclusion(mlp_family):
    assert adapted_paths(mlp_family.model(), target_modules=["2"]) == ["2"]
    assert adapted_paths(mlp_family.model(), target_modules="[02]") == ["0", "2"]
    assert adapted_paths(mlp_family.model(), target_modules="all-linear") == ["0", "2"]
    left = adapted_paths(mlp_family.model(), target_modules=["0", "2"], exclude_modules=["0"])
    assert left == ["2"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_second_adapter_on_all_linear_layers(mlp_family):
    model = mlp_family.model()
    adapted_paths(model, target_modules="all-linear")
    inject_adapter_in_model(CONFIG(r=4, target_modules="all-linear"), model, "second")
    assert [path for path, _ in delta_layers(model, "second")] == ["0", "2"]


def test_targets_that_do_not_exist(mlp_family):
    with pytest.raises(ValueError, match=r"Target modules .*nowhere.* not found in the base model"):
        inject_adapter_in_model(CONFIG(target_modules=["nowhere"]), mlp_family.model())


def test_modules_to_save_train_and_travel(tmp_path):
    from peft import PeftModel

    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})

    model = get_peft_model(base(), CONFIG(r=4, target_modules=["body"], modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model["head"].modules_to_save["default"].weight.fill_(3.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert (loaded.base_model.model["head"].weight == 3.0).all()
    merged = loaded.merge_and_unload()
    assert (merged["head"].weight == 3.0).all()


def test_merge_and_unload_returns_plain_layers(mlp_family):
    config = CONFIG(r=8, seed=0, target_modules=["0", "2"], scale=50.0)
    model = get_peft_model(mlp_family.model(), config).eval()
    with torch.no_grad():
        expected = mlp_family.run(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged] == [nn.Linear, nn.GELU, nn.Linear]
    with torch.no_grad():
        assert torch.equal(mlp_family.run(merged), expected)
    untouched = get_peft_model(mlp_family.model(), config).unload()
    assert torch.equal(untouched[0].weight, mlp_family.base[0].weight)


def test_a_broken_adapter_leaves_the_model_whole_when_unloading(mlp_family):
    model = get_peft_model(mlp_family.model(), CONFIG(r=8, target_modules=["0", "2"]))
    with torch.no_grad():
        model.base_model.model[2].snella_A["default"].fill_(torch.nan)
    with pytest.raises(ValueError, match="would write NaN"):
        model.merge_and_unload(safe_merge=True)
    assert [path for path, _ in delta_layers(model)] == ["0", "2"]
    assert torch.equal(model.base_model.model[0].weight, mlp_family.base[0].weight)


def test_adapters_of_an_inference_config_do_not_train(mlp_family):
    model = mlp_family.model()
    adapted_paths(model, target_modules=["0"], inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
