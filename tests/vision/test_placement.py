"""Dropout and stochastic depth of branches, where the public code has them."""

import torch
from peft import LoraConfig, inject_adapter_in_model

from snell_diffusion.vision.loading import load_base
from snell_diffusion.vision.placement import (
    SharedMasks,
    drop_samples,
    place_backbone,
    place_branches,
)
from tests.vision import runs


def adapted(base: str) -> torch.nn.Module:
    """A base with a LoRA that does something."""
    model = load_base(base, 3).model
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1"], init_lora_weights=False
    )
    inject_adapter_in_model(settings, model)
    return model


def test_drop_samples() -> None:
    """About a share of the samples is zero, the others make up for them."""
    torch.manual_seed(0)
    dropped = drop_samples(torch.ones(4000, 2, 3), 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert dropped.view(4000, -1).std(1).max() == 0  # whole samples
    assert abs(dropped.mean().item() - 1) < 0.05


def test_masks_are_shared_by_what_reads_the_same_tensor() -> None:
    masks, x = SharedMasks(0.5), torch.ones(4, 8)
    first = masks.mask(x, "block")
    assert masks.mask(x, "block") is first
    assert not torch.equal(masks.mask(x, "other"), first)
    assert not torch.equal(masks.mask(x.clone(), "block"), first)
    assert not torch.equal(masks.mask(x, None), masks.mask(x, None))
    assert set(first.unique().tolist()) == {0.0, 2.0}


def test_branches_by_role(bases: dict[str, str]) -> None:
    """q, k and v see one dropped input, fc1 another, the output projection its own undropped; the
    base's part of every layer sees the input itself."""
    model = adapted(bases["vit"])
    layers = dict(model.named_modules())
    attention = "vit.layers.0.attention"
    seen: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = layers[f"{attention}.{name}"]
        layer.lora_A["default"].register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    inputs: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "o_proj"):
        layers[f"{attention}.{name}"].register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0]})
        )
    place_branches(model, 0.3, 0.0)
    model.train()
    torch.manual_seed(1)
    model(pixel_values=torch.randn(2, 3, runs.SIDE, runs.SIDE))
    assert torch.equal(seen["q_proj"], seen["k_proj"])
    assert torch.equal(seen["q_proj"], seen["v_proj"])
    kept = seen["q_proj"] != 0
    torch.testing.assert_close(seen["q_proj"][kept], inputs["q_proj"][kept] / 0.7)
    assert 0.6 < kept.float().mean() < 0.8
    assert torch.equal(seen["o_proj"], inputs["o_proj"])


def test_branch_is_dropped_by_sample(bases: dict[str, str]) -> None:
    """Dropped samples get the base's own output, the others more of the branch."""
    model = adapted(bases["vit"])
    layer = dict(model.named_modules())["vit.layers.1.mlp.fc1"]
    x = torch.randn(64, 5, 32)
    base = layer.base_layer(x)
    effect = layer(x) - base
    place_branches(model, 0.0, 0.25)
    model.train()
    torch.manual_seed(0)
    y = layer(x)
    factors = ((y - base) * effect).sum((1, 2)) / (effect**2).sum((1, 2))
    rounded = {round(value, 4) for value in factors.tolist()}
    assert rounded == {0.0, round(1 / 0.75, 4)}
    model.eval()
    torch.testing.assert_close(layer(x), base + effect)


def test_backbone_depth_grows_linearly(bases: dict[str, str]) -> None:
    """The first block never drops, the last with the full share; what came with a model is off."""
    for name in runs.BASES:
        loaded = load_base(bases[name], 3)
        branches = loaded.family.branches(loaded.model)
        assert [depth for _, depth in branches] == sorted(depth for _, depth in branches)
        assert branches[0][1] == 0.0
        assert branches[-1][1] == 1.0
        place_backbone(branches, 0.0)
        x = torch.randn(2, 3, runs.SIDE, runs.SIDE)
        loaded.model.train()
        with torch.no_grad():
            plain = loaded.family.logits(loaded.model, x)
            assert torch.equal(plain, loaded.family.logits(loaded.model, x))
            place_backbone(branches, 0.9)
            torch.manual_seed(0)
            draws = [loaded.family.logits(loaded.model, x) for _ in range(4)]
            assert any(not torch.allclose(draw, plain) for draw in draws)
            loaded.model.eval()
            torch.testing.assert_close(loaded.family.logits(loaded.model, x), plain)
