"""ARC's layer: what is shared with whom, start, merging, cross-attention."""

from copy import deepcopy

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.arc import ArcConfig, ArcLayer
from tests.tuners.conftest import family_named

I, O = 24, 40


def layer_on(base: nn.Module | None = None, key="layer", **changes) -> ArcLayer:
    base = nn.Linear(I, O) if base is None else base
    config = ArcConfig(**{"r": 6, "seed": 0, **changes})
    return ArcLayer(base.requires_grad_(False), "default", config, key=key).eval()


def stir(model: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "arc_" in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def adapted(name: str, **changes) -> nn.Module:
    return inject_adapter_in_model(
        ArcConfig(**{"r": 6, "seed": 0, **changes}), family_named(name).model()
    ).eval()


def holders(model: nn.Module, container: str) -> list[str]:
    return [path for path, layer in delta_layers(model) if "default" in getattr(layer, container)]


def test_the_formula():
    layer = layer_on(scale=0.5)
    stir(layer)
    x = torch.randn(2, 3, I)
    U, s, b = layer.parts("default")
    h = x + 0.5 * (((x @ U) * s) @ U.T + b)
    torch.testing.assert_close(layer(x), layer.base_layer(h))


def test_attention_starts_as_the_identity_and_the_mlp_as_in_the_paper():
    x = torch.randn(3, I)
    for key, init, same in (
        ("blocks.0.attn.to_q", "paper", True),
        ("blocks.0.mlp.fc1", "paper", False),
        ("blocks.0.mlp.fc1", "identity", True),
    ):
        layer = layer_on(key=key, init=init, r=50)
        assert torch.equal(layer(x), layer.base_layer(x)) is same
        bound = (6 / (I + 50)) ** 0.5
        assert 0.9 * bound < layer.arc_U["default"].abs().max() <= bound
    assert 0.3 < layer_on(key="fc1", r=50).arc_s["default"].abs().max() <= (6 / 51) ** 0.5


def test_a_vision_transformer_shares_two_projections():
    model = adapted("vit")
    assert len(holders(model, "arc_U")) == 2
    adapters = holders(model, "arc_s")
    assert adapters == holders(model, "arc_b")
    assert len(adapters) == 4  # two in each of two blocks
    layers = dict(delta_layers(model))
    assert len(layers) == 8
    for path, layer in layers.items():
        if path.endswith(("k_proj", "v_proj")):
            q = layers[path[:-6] + "q_proj"]
            assert all(
                a is b for a, b in zip(layer.parts("default"), q.parts("default"), strict=True)
            )
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == 2 * 32 * 6 + 4 * (32 + 6)


def test_cross_attention_keys_and_values_stay_and_its_queries_have_their_own():
    model = adapted("unet_sd15")
    paths = [path for path, _ in delta_layers(model)]
    assert not any(path.endswith(("attn2.to_k", "attn2.to_v")) for path in paths)
    layers = dict(delta_layers(model))
    first, second = (
        layers[f"down_blocks.0.attentions.0.transformer_blocks.0.attn{n}.to_q"] for n in (1, 2)
    )
    assert first.parts("default")[0] is second.parts("default")[0]
    assert first.parts("default")[1] is not second.parts("default")[1]
    assert any(path.endswith("ff.net.0.proj") for path in paths)


def test_a_second_stream_has_its_own():
    layers = dict(delta_layers(adapted("sd3")))
    block = "transformer_blocks.0.attn."
    image, text = (layers[block + name].parts("default") for name in ("to_k", "add_k_proj"))
    assert image[0] is text[0]
    assert image[1] is not text[1]
    assert layers[block + "add_q_proj"].parts("default")[1] is text[1]


@pytest.mark.parametrize("name", ["vit", "unet_sd15", "sd3", "flux"])
def test_merged_is_unmerged_and_unmerging_restores_every_bit(name):
    family, model = family_named(name), adapted(name)
    stir(model)
    with torch.no_grad():
        base, unmerged = family.run(family.base), family.run(model)
        assert (unmerged - base).abs().max() > 1e-3
        before = {n: t.clone() for n, t in model.state_dict().items()}
        biases = {path: layer.get_base_layer().bias for path, layer in delta_layers(model)}
        for _, layer in delta_layers(model):
            layer.merge(safe_merge=True)
        torch.testing.assert_close(family.run(model), unmerged, rtol=1e-4, atol=1e-5)
        for _, layer in delta_layers(model):
            layer.unmerge()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    for path, layer in delta_layers(model):
        assert layer.get_base_layer().bias is biases[path]


def test_dropout_drops_numbers_of_the_code():
    layer = layer_on(dropout=0.5).train()
    stir(layer)
    x = torch.randn(3, 5, I)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    U, s, b = layer.parts("default")
    h = x + torch.nn.functional.dropout((x @ U) * s, 0.5) @ U.T + b
    torch.testing.assert_close(y, layer.base_layer(h))


def test_copies_share_among_themselves():
    model = adapted("vit")
    stir(model)
    family = family_named("vit")
    copy = deepcopy(model)
    expected = family.run(model).detach()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(family.run(model).detach(), expected)
    for (_, layer), (_, other) in zip(delta_layers(model), delta_layers(copy), strict=True):
        assert not {*map(id, layer.parts("default"))} & {*map(id, other.parts("default"))}


def test_a_name_that_was_deleted_can_be_used_again():
    base = nn.ModuleDict({name: nn.Linear(I, O) for name in ("to_q", "to_k", "to_v")})
    model = get_peft_model(base, ArcConfig(r=6, seed=0), "first")
    model.add_adapter("second", ArcConfig(r=4, seed=1))
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("first")
    model.add_adapter("first", ArcConfig(r=3, target_modules=["to_k", "to_v"], seed=2))
    layers = dict(delta_layers(model, "first"))
    assert list(layers) == ["to_k", "to_v"]
    assert all(layer.parts("first")[0].shape == (I, 3) for layer in layers.values())
    assert holders(model, "arc_U") == []
    assert [p for p, layer in delta_layers(model) if "first" in layer.arc_U] == ["to_k"]
    assert [p for p, layer in delta_layers(model) if "second" in layer.arc_U] == ["to_q"]


def test_gradients_of_the_shared_projection_add_up():
    family, model = family_named("vit"), adapted("vit").train()
    stir(model)
    family.run(model).square().sum().backward()
    shared = [p for n, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in shared)


def test_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(SnellaConfigError, match=r"target module '0' is a convolution: leave it"):
        get_peft_model(model, ArcConfig(target_modules=["0"]))


def test_settings():
    assert ArcConfig.diffusion(r=4) == ArcConfig(r=4, init="identity")
    with pytest.raises(SnellaConfigError, match="init 'zero' is unknown; known: paper, identity"):
        ArcConfig(init="zero")
