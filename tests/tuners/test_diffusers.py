"""The verbs diffusers and transformers models already have, on our layers."""

import pytest
import torch
from peft import LoraConfig

from snell_diffusion.tuners import SnellaConfig, delta_layers, delta_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def stir(model, adapter, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta_parameters(model, adapter).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def run(family, model, **kwargs):
    with torch.no_grad():
        return family.run(model, **kwargs)


@pytest.fixture
def unet(unet_family):
    """A UNet with two stirred adapters, "one" active."""
    model = unet_family.model()
    model.add_adapter(SnellaConfig.paper(r=8, seed=0), "one")
    model.add_adapter(SnellaConfig.paper(r=4, seed=1, target_modules=["to_q", "to_v"]), "two")
    stir(model, "one", 2)
    stir(model, "two", 3)
    model.set_adapter("one")
    return model


def test_default_targets_are_the_attention_projections(unet):
    paths = [path for path, _ in delta_layers(unet, "one")]
    assert {path.rpartition("attn")[2][2:] for path in paths} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert unet.peft_config["one"].target_modules == ["to_k", "to_out.0", "to_q", "to_v"]


def test_set_adapters_with_weights(unet, unet_family):
    base = run(unet_family, unet_family.base)
    full = run(unet_family, unet)
    unet.set_adapters(["one"], [0.0])
    assert torch.equal(run(unet_family, unet), base)
    unet.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(run(unet_family, unet), full)
    unet.set_adapters(["one", "two"], [0.5, 0.7])
    assert unet.active_adapters() == ["one", "two"]
    expected = unet_family.model()
    with torch.no_grad():
        for path, layer in delta_layers(unet):
            weight = expected.get_submodule(path).weight
            delta = layer.get_delta_weight("one")
            weight += delta + layer.get_delta_weight("two") if "two" in layer.configs else delta
    torch.testing.assert_close(run(unet_family, unet), run(unet_family, expected))


def test_block_weights(unet, unet_family):
    unet.set_adapters(["one"], [{"down": 0.0, "mid": 0.5, "up": 2.0}])
    scales = {path.partition("_")[0]: layer.scaling["one"] for path, layer in delta_layers(unet)}
    assert scales == {"down": 0.0, "mid": 0.5, "up": 2.0}


def test_disable_enable_and_delete(unet, unet_family):
    base, full = run(unet_family, unet_family.base), run(unet_family, unet)
    unet.disable_adapters()
    assert torch.equal(run(unet_family, unet), base)
    unet.enable_adapters()
    assert torch.equal(run(unet_family, unet), full)
    unet.delete_adapters("two")
    assert torch.equal(run(unet_family, unet), full)
    unet.unload_lora()
    assert not list(delta_layers(unet))
    assert torch.equal(run(unet_family, unet), base)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_fuse_and_unfuse_leave_the_adapter_at_its_weight(unet, unet_family, strength):
    unet.set_adapters(["one"], [0.8])
    weights = {name: p.clone() for name, p in unet.named_parameters()}
    before = run(unet_family, unet)
    unet.fuse_lora(lora_scale=strength, safe_fusing=True)
    fused = run(unet_family, unet)
    unet.unfuse_lora()
    assert all(torch.equal(p, weights[name]) for name, p in unet.named_parameters())
    assert torch.equal(run(unet_family, unet), before)
    unet.set_adapters(["one"], [0.8 * strength])
    torch.testing.assert_close(run(unet_family, unet), fused)


@pytest.mark.parametrize("strength", [0.5, 0.0])
def test_call_time_scale(unet, unet_family, strength):
    unet.set_adapters(["one"], [0.8])
    full = run(unet_family, unet)
    scaled = run(unet_family, unet, cross_attention_kwargs={"scale": strength})
    assert torch.equal(run(unet_family, unet), full)
    unet.set_adapters(["one"], [0.8 * strength])
    torch.testing.assert_close(scaled, run(unet_family, unet))


def test_next_to_a_lora_with_its_own_scale(unet, unet_family):
    alone = run(unet_family, unet)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "lora")
    unet.set_adapters(["one", "lora"], [1.0, 0.0])
    torch.testing.assert_close(run(unet_family, unet), alone)
    unet.set_adapters(["one", "lora"], [1.0, 1.0])
    both = run(unet_family, unet)
    assert not torch.allclose(both, alone)
    unet.fuse_lora()
    torch.testing.assert_close(run(unet_family, unet), both)
    unet.unfuse_lora()
    torch.testing.assert_close(run(unet_family, unet), both)
    unet.delete_adapters("lora")
    unet.set_adapter("one")
    torch.testing.assert_close(run(unet_family, unet), alone)


def test_training_through_gradient_checkpointing(unet, unet_family):
    unet.train()
    unet_family.run(unet).square().mean().backward()
    plain = {n: p.grad.clone() for n, p in delta_parameters(unet, "one").items()}
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    unet_family.run(unet).square().mean().backward()
    for name, parameter in delta_parameters(unet, "one").items():
        torch.testing.assert_close(parameter.grad, plain[name])
    assert all(p.grad is None for p in delta_parameters(unet, "two").values())


def test_transformers_verbs(clip_family, tmp_path):
    from peft import get_peft_model

    source = get_peft_model(clip_family.model(), SnellaConfig.paper(r=8, seed=0))
    stir(source, "default")
    for index, (_, layer) in enumerate(delta_layers(source)):
        layer.set_sparsity("default", 0.05 * index)
    source.eval().save_pretrained(tmp_path)
    expected = run(clip_family, source)

    model = clip_family.model()
    model.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(run(clip_family, model), expected)
    levels = [layer.sparsity("mine") for _, layer in delta_layers(model)]
    assert levels == [0.05 * index for index in range(len(levels))]
    model.disable_adapters()
    assert torch.equal(run(clip_family, model), run(clip_family, clip_family.base))
    model.enable_adapters()
    model.add_adapter(SnellaConfig(r=4, init="identity", sparsify="mask"), "other")
    model.set_adapter(["mine", "other"])
    assert torch.equal(run(clip_family, model), expected)
    model.delete_adapter("other")
    assert torch.equal(run(clip_family, model), expected)
    assert set(model.get_adapter_state_dict("mine")) == {
        f"{path}.{name}" for path, layer in delta_layers(model) for name, _ in layer.containers()
    }
