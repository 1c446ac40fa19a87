"""Any tuner on top of a compressed model."""

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from snell_diffusion.compress import compress, low_rank_layers, tuner_targets
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.recipes import RECIPES
from tests.compress.models import pixels, small_vit
from tests.tiny_models import denoiser_inputs, sd15_unet

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
RANKS = {"oft": 2}  # must divide the ranks too
METHODS = [name for name, recipe in RECIPES.items() if not recipe.trains_base]


def adapted(method: str, model: nn.Module, names: list[str]) -> nn.Module:
    recipe = RECIPES[method]
    targets = tuner_targets(model, names, whole=recipe.ours)
    settings = {"rank": RANKS.get(method, 4)} if "rank" in recipe.settings else {}
    config = recipe.config(settings, targets, seed=0, domain="vision", steps=100)
    model.requires_grad_(False)
    return inject_adapter_in_model(config, model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of PEFT's SHiRA
def test_trains_on_a_compressed_vit(method: str) -> None:
    model = small_vit()
    compress(model, 2)
    adapted(method, model, NAMES)
    trained = [p for p in model.parameters() if p.requires_grad]
    factors = [p for _, layer in low_rank_layers(model) for p in layer.parameters()]
    frozen = [p.clone() for p in factors if not p.requires_grad]
    assert trained
    optimizer = torch.optim.Adam(trained, lr=1e-2, eps=1e-15)
    target = torch.arange(4)
    model.train()
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(pixels()).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-4
    still = [p for p in factors if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(still, frozen, strict=True))


@pytest.mark.parametrize("method", ["snella", "lora"])
def test_trains_on_a_compressed_unet(method: str) -> None:
    model = sd15_unet()
    compress(model, 2)
    adapted(method, model, ["to_q", "to_k", "to_v", "to_out.0"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2, eps=1e-15)
    losses = []
    for _ in range(8):
        loss = model(**denoiser_inputs("sd15")).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_ours_sit_on_the_whole_layer_and_peft_on_its_factors() -> None:
    ours, theirs = small_vit(), small_vit()
    for model in (ours, theirs):
        compress(model, 2)
    adapted("snella", ours, ["q_proj"])
    paths = [path for path, _ in delta_layers(ours)]
    assert paths == [f"vit.layers.{k}.attention.q_proj" for k in (0, 1)]
    _, layer = next(delta_layers(ours))
    assert layer.get_delta_weight("default").shape == (32, 32)
    adapted("lora", theirs, ["q_proj"])
    wrapped = [path for path, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert wrapped[:2] == [
        "vit.layers.0.attention.q_proj.first",
        "vit.layers.0.attention.q_proj.second",
    ]


def test_update_adds_to_the_factors_product() -> None:
    model, x = small_vit(), torch.randn(3, 32)
    compress(model, 2)
    adapted("snella", model, ["q_proj"])
    _, layer = next(delta_layers(model))
    base = layer.get_base_layer()
    want = base(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x), want)
