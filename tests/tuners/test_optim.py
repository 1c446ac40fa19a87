"""Which tensors decay, and which learn at their own rate."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from snell_diffusion.tuners import SnellaConfig, param_groups


def model_with(**changes):
    base = nn.ModuleDict(
        {"body": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 2)}
    )
    config = SnellaConfig.paper(**{"r": 4, "target_modules": ["body"], **changes})
    return get_peft_model(base, config)


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)].rpartition("base_model.model.")[2] for p in group["params"]}


def test_factors_decay_and_scalars_learn_at_their_own_rate():
    model = model_with(modules_to_save=["head"])
    groups = {g["name"]: g for g in param_groups(model, lr=1e-3, weight_decay=0.05, scalar_lr=1e-5)}
    assert list(groups) == ["factors", "scalars", "others", "others_undecayed"]
    assert names_of(model, groups["factors"]) == {"body.snella_A.default", "body.snella_B.default"}
    assert names_of(model, groups["scalars"]) == {
        f"body.snella_{name}.default" for name in ("alpha", "gamma", "beta")
    }
    assert names_of(model, groups["others"]) == {"head.modules_to_save.default.weight"}
    assert names_of(model, groups["others_undecayed"]) == {"head.modules_to_save.default.bias"}
    settings = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert settings == {
        "factors": (1e-3, 0.05),
        "scalars": (1e-5, 0.0),
        "others": (1e-3, 0.05),
        "others_undecayed": (1e-3, 0.0),
    }
    grouped = sum(len(g["params"]) for g in groups.values())
    assert grouped == sum(p.requires_grad for p in model.parameters())


def test_frozen_tensors_are_in_no_group():
    model = model_with(train_beta=False, train_gamma=False)
    groups = param_groups(model, lr=1e-3)
    assert [g["name"] for g in groups] == ["factors", "scalars"]
    assert names_of(model, groups[1]) == {"body.snella_alpha.default"}
    assert groups[1]["lr"] == 1e-3
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("rates", [{"lr": 0.0}, {"lr": -1.0}, {"lr": 1e-3, "weight_decay": -1.0}])
def test_rates_out_of_range(rates):
    with pytest.raises(ValueError, match="must be a finite number, 0 or more"):
        param_groups(model_with(), **rates)


def test_nothing_to_train():
    model = model_with().requires_grad_(False)
    with pytest.raises(ValueError, match="adapter 'default' has no trainable tensor in PeftModel"):
        param_groups(model, lr=1e-3)
