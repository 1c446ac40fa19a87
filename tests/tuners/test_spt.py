"""SPT: the sensitivity pass over real models, what is tuned, and how little else."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from snell_diffusion.errors import SnellaConfigError, SnellaValueError
from snell_diffusion.tuners import delta_layers, delta_parameters
from snell_diffusion.tuners.spt_adapter import (
    SptAdapterConfig,
    SptAdapterLayer,
    SptAdapterNormLayer,
)
from snell_diffusion.tuners.spt_lora import SptLoraConfig, SptLoraLayer, SptLoraNormLayer
from snell_diffusion.tuners.spt_selection import SptSelection, is_norm, select
from tests.tuners.conftest import Family, family_named

MODELS = pytest.mark.parametrize("name", ["vit", "unet_sd15", "sd3"])
SELECTION = {
    "structured": ["encoder.layer.0.fc1"],
    "vectors": ["encoder.layer.0.fc1.bias"],
    "entries": {"encoder.layer.1.fc1.weight": [3, 77, 1000], "encoder.layer.1.fc2.bias": [5]},
}


def losses(family: Family, model: nn.Module, batches: int = 2) -> Iterator[Tensor]:
    for batch in range(batches):
        out = family.run(model)
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(batch))
        yield (out - target).square().mean()


def config_for(family: Family, budget: int, kind: type = SptLoraConfig, **changes):
    given = {"r": 2, "seed": 0, "alpha": 2.0, "budget": budget, **changes}
    model = family.model()
    config = kind(**given)
    return config.selected(model, losses(family, model))


def block_paths(model: nn.Module) -> dict[str, str]:
    """SELECTION's short paths by those that this version of transformers uses."""
    names = [name for name, _ in model.named_modules()]
    return {
        f"encoder.layer.{block}.{part}": next(
            n for n in names if n.endswith((f"{block}.mlp.{part}", f"{block}.{part}"))
        )
        for block in (0, 1)
        for part in ("fc1", "fc2")
    }


def selection_of(model: nn.Module) -> dict:
    paths = block_paths(model)

    def there(path: str) -> str:
        module, _, kind = path.rpartition(".")
        return paths[path] if path in paths else f"{paths[module]}.{kind}"

    return {
        "structured": [there(path) for path in SELECTION["structured"]],
        "vectors": [there(path) for path in SELECTION["vectors"]],
        "entries": {there(path): found for path, found in SELECTION["entries"].items()},
    }


def stir(model: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in delta_parameters(model, "default").values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# The sensitivity pass


@MODELS
@pytest.mark.parametrize("budget", [300, 2000])
def test_the_pass_meets_the_budget_and_tunes_what_it_chose(name, budget):
    family = family_named(name)
    config = config_for(family, budget)
    model = inject_adapter_in_model(config, family.model())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in delta_parameters(model, "default").values())
    assert 0.7 * budget < trained < 1.3 * budget
    assert [path for path, _ in delta_layers(model)] == [
        path for path, _ in family.base.named_modules() if path in config.chosen.modules()
    ]


def test_entries_are_the_most_sensitive_ones():
    family = family_named("mlp")
    model = family.model()
    config = SptLoraConfig(r=2, alpha=1e-6, structured_vectors=False, target_modules=["0", "2"])
    found = select(model, losses(family, model), config, 40, targets=["0", "2"])
    assert found.structured == found.vectors == ()
    scores = {}
    model.requires_grad_(True)
    for loss in losses(family, model):
        named = dict(model.named_parameters())
        for path, gradient in zip(
            named, torch.autograd.grad(loss, list(named.values())), strict=True
        ):
            scores[path] = scores.get(path, 0) + gradient.square()
    limit = torch.cat([s.flatten() for s in scores.values()]).topk(40).values.min()
    for path, score in scores.items():
        expected = (score.flatten() >= limit).nonzero().flatten().tolist()
        assert list(found.entries.get(path, [])) == expected


def test_the_pass_leaves_the_model_as_it_was():
    family = family_named("vit")
    model = family.model()
    first = next(model.parameters())
    first.requires_grad_(True)
    before = deepcopy(model.state_dict())
    SptLoraConfig(budget=300, r=2).selected(model, losses(family, model))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()].count(True) == 1
    assert first.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_norms_are_tuned_unless_switched_off():
    family = family_named("vit")
    norms = [path for path, module in family.base.named_modules() if is_norm(module)]
    assert len(norms) == 5
    config = config_for(family, 1500)
    assert {path.rpartition(".")[0] for path in config.chosen.vectors} & {*norms}
    model = inject_adapter_in_model(config, family.model()).eval()
    layers = dict(delta_layers(model))
    tuned = [path for path in norms if path in layers]
    assert tuned
    assert all(isinstance(layers[path], SptLoraNormLayer) for path in tuned)
    without = config_for(family, 1500, tune_norms=False)
    assert not {*without.chosen.modules()} & {*norms}


def test_the_public_sweep_marks_in_steps_of_20_000():
    family = family_named("vit")
    model = family.model()
    config = SptLoraConfig(budget=3000, r=2)
    found = config.selected(model, losses(family, model), public_sweep=True).chosen
    assert len(found.structured) == 12  # 20,000 are more than all
    assert not found.entries


def test_passes_that_cannot_work():
    family = family_named("vit")
    model = family.model()
    config = SptLoraConfig(budget=300, r=2)
    with pytest.raises(SnellaValueError, match="gradients of at least one batch, got none"):
        config.selected(model, [])
    with pytest.raises(SnellaValueError, match=r"does not depend on what may be tuned.*generator"):
        config.selected(model, [torch.zeros(())])
    with pytest.raises(SnellaConfigError, match="budget of SPT_LORA must be set"):
        SptLoraConfig(r=2).selected(model, [])
    config = SptLoraConfig(r=512, budget=60, alpha=1e9, structured_only=True, tune_norms=False)
    with pytest.raises(SnellaValueError, match=r"comes close to a budget of 60 parameters"):
        replace(config, structured_vectors=False).selected(model, losses(family, model))
    with pytest.raises(SnellaConfigError, match=r"run config.selected\(model, losses\) first"):
        inject_adapter_in_model(SptLoraConfig(budget=5), model)


# The layers


def test_everything_without_a_selection():
    family = family_named("vit")
    model = inject_adapter_in_model(SptLoraConfig(r=2), family.model())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * (
        4 * (32 + 32) + 2 * (32 + 40)
    )


@MODELS
def test_starts_as_the_base_and_merges(name):
    family = family_named(name)
    config = config_for(family, 2000)
    model = inject_adapter_in_model(config, family.model()).eval()
    with torch.no_grad():
        base = family.run(family.base)
        torch.testing.assert_close(family.run(model), base, rtol=1e-5, atol=1e-6)
        stir(model)
        unmerged = family.run(model)
        assert (unmerged - base).abs().max() > 1e-3
        before = {n: t.clone() for n, t in model.state_dict().items()}
        for _, layer in delta_layers(model):
            layer.merge(safe_merge=True)
        torch.testing.assert_close(family.run(model), unmerged, rtol=1e-3, atol=1e-4)
        for _, layer in delta_layers(model):
            layer.unmerge()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@MODELS
def test_everything_tuned_gets_a_gradient(name):
    family = family_named(name)
    model = inject_adapter_in_model(config_for(family, 2000), family.model()).train()
    stir(model)
    (loss,) = losses(family, model, 1)
    loss.backward()
    for path, parameter in delta_parameters(model, "default").items():
        assert parameter.grad is not None, path
        if not path.endswith(("to_k.spt_lora_bias", "k_proj.spt_lora_bias")):  # softmax is blind
            assert parameter.grad.abs().max() > 0, path


def test_the_formula_of_one_layer():
    base = nn.Linear(6, 5).requires_grad_(False)
    selection = {
        "structured": ["layer"],
        "vectors": ["layer.bias"],
        "entries": {"layer.weight": [7, 29]},
    }
    config = SptLoraConfig(r=2, selection=selection, scale=0.5)
    layer = SptLoraLayer(base, "default", config, key="layer").eval()
    with torch.no_grad():
        for _, container in layer.containers():
            for tensor in container.values():
                if tensor.is_floating_point():
                    tensor.normal_(generator=torch.Generator().manual_seed(5))
    W = base.weight.clone()
    W[1, 1] += 0.5 * layer.spt_lora_entries["default"][0]
    W[4, 5] += 0.5 * layer.spt_lora_entries["default"][1]
    W += 0.5 * layer.spt_lora_up["default"] @ layer.spt_lora_down["default"]
    b = base.bias + 0.5 * layer.spt_lora_bias["default"]
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), x @ W.T + b)
    with torch.no_grad():
        layer.merge()
    torch.testing.assert_close(base.weight, W.detach())
    torch.testing.assert_close(base.bias, b.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_next_to_a_16_bit_base(dtype):
    base = nn.Linear(6, 5).to(dtype).requires_grad_(False)
    selection = {"structured": ["layer"], "entries": {"layer.weight": [7], "layer.bias": [2]}}
    layer = SptLoraLayer(base, "default", SptLoraConfig(r=2, selection=selection), key="layer")
    y = layer.train()(torch.randn(3, 6).to(dtype))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    for name in ("up", "entries", "bias_entries"):
        gradient = layer.held(name)["default"].grad
        assert gradient.dtype == torch.float32
        assert gradient.abs().max() > 0


def test_positions_come_with_the_tensors():
    family = family_named("vit")
    config = SptLoraConfig(r=2, seed=0, selection=selection_of(family.base))
    model = inject_adapter_in_model(config, family.model()).eval()
    stir(model)
    tensors = {
        path: {n: c["default"] for n, c in layer.containers() if "default" in c}
        for path, layer in delta_layers(model)
    }
    shapes = {path: {n: list(t.shape) for n, t in own.items()} for path, own in tensors.items()}
    again = SptLoraConfig.stored({"r": 2}, shapes)
    assert again.chosen.entries != config.chosen.entries
    other = inject_adapter_in_model(again, family.model()).eval()
    for path, layer in delta_layers(other):
        for name, container in layer.containers():
            if "default" in container:
                with torch.no_grad():
                    container["default"].copy_(tensors[path][name])
    with torch.no_grad():
        assert torch.equal(family.run(other), family.run(model))


def test_positions_of_a_file_are_looked_at():
    good = {"spt_lora_positions": torch.tensor([0, 29]), "spt_lora_bias_positions": torch.ones(1)}
    SptLoraLayer.check_stored({**good, "spt_lora_bias_positions": torch.tensor([4])}, (5, 6))
    for positions in (torch.tensor([30]), torch.tensor([-1]), torch.tensor([2, 2]), torch.ones(1)):
        with pytest.raises(ValueError, match=r"spt_lora_positions.*whole numbers, 0 to 29.*got"):
            SptLoraLayer.check_stored({"spt_lora_positions": positions}, (5, 6))
    with pytest.raises(ValueError, match=r"spt_lora_bias_positions.*0 to 4"):
        SptLoraLayer.check_stored(good, (5, 6))


def test_a_selection_for_another_model():
    model = family_named("vit").model()
    found = selection_of(model)
    (path,) = found["structured"]
    for entries, message in (
        ({f"{path}.weight": [10**6]}, r"must be below 1280, .* got 1000000: it is for another"),
        ({"nowhere.weight": [0]}, "selection names nowhere, which this ViTModel does not have"),
        ({"layernorm.gain": [0]}, "end in .weight or .bias, got layernorm.gain"),
    ):
        with pytest.raises(SnellaConfigError, match=message):
            inject_adapter_in_model(SptLoraConfig(r=2, selection={"entries": entries}), model)
    with pytest.raises(SnellaConfigError, match="leave it out of target_modules"):
        inject_adapter_in_model(SptLoraConfig(selection={"structured": ["layernorm"]}), model)
    with pytest.raises(SnellaConfigError, match="'0' is a convolution"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 1)), SptLoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ([], r"must be a table with structured, vectors, entries, got \[\]"),
        ({"layers": []}, "must be a table with structured, vectors, entries"),
        ({"structured": []}, "must name at least one layer or parameter"),
        ({"entries": {"a.bias": [1, 1]}}, "entries of a.bias must be different whole numbers"),
        ({"entries": {"a.bias": [-1]}}, "entries of a.bias must be different whole numbers"),
        ({"entries": {"a.bias": "12"}}, "entries of a.bias must be different whole numbers"),
    ],
)
def test_selections_that_are_none(selection, message):
    with pytest.raises(SnellaConfigError, match=message):
        SptLoraConfig(selection=selection)


def test_a_selection_survives_its_table():
    found = SptSelection.from_dict(SELECTION)
    assert SptSelection.from_dict(found.to_dict()) == found
    assert found.count("encoder.layer.1.fc1.weight") == 3
    assert found.modules() == [f"encoder.layer.{n}" for n in ("0.fc1", "1.fc1", "1.fc2")]


# SPT-Adapter


def adapter_layer(key: str, **changes) -> SptAdapterLayer:
    base = nn.Linear(6, 5).requires_grad_(False)
    layer = SptAdapterLayer(base, "default", SptAdapterConfig(r=2, **changes), key=key).eval()
    with torch.no_grad():
        for name in layer.parts:
            layer.held(name)["default"].normal_(generator=torch.Generator().manual_seed(5))
    return layer


@pytest.mark.parametrize(("key", "width"), [("attn.to_q", 5), ("attn.to_out.0", 6), ("fc2", 5)])
def test_the_adapter_reads_the_output_and_at_the_attentions_output_the_input(key, width):
    layer = adapter_layer(key, scale=0.5)
    down, down_bias, up, up_bias = (layer.held(name)["default"] for name in layer.parts)
    assert down.shape == (2, width)
    x = torch.randn(3, 6)
    y = layer.base_layer(x)
    code = nn.functional.gelu((x if width == 6 else y) @ down.T + down_bias)
    torch.testing.assert_close(layer(x), y + 0.5 * (code @ up.T + up_bias))
    size = sum(layer.held(name)["default"].numel() for name in layer.parts)
    assert SptAdapterConfig(r=2).module_size(key, 5, 6) == size


def test_adapters_do_not_merge():
    with pytest.raises(ValueError, match="SPT-Adapter cannot be merged: its adapters have a GELU"):
        adapter_layer("fc1").merge()


@pytest.mark.parametrize("key", ["attn.to_q", "attn.to_out.0"])
def test_the_adapters_size_is_that_of_its_matrix(key):
    layer = adapter_layer(key, scale=-0.5)
    up, down = layer.held("up")["default"], layer.held("down")["default"]
    matrix = up @ down if "out" in key else up @ down @ layer.base_layer.weight
    assert layer.update_size("default") == pytest.approx(0.5 * float(matrix.detach().norm()))


@MODELS
def test_the_adapter_starts_as_the_base_and_trains(name):
    family = family_named(name)
    config = config_for(family, 2000, SptAdapterConfig)
    model = inject_adapter_in_model(config, family.model()).eval()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 1400 < trained < 2600
    with torch.no_grad():
        torch.testing.assert_close(family.run(model), family.run(family.base), rtol=1e-5, atol=1e-6)
    stir(model, 0.05)
    (loss,) = losses(family, model, 1)
    loss.backward()
    assert all(p.grad is not None for p in delta_parameters(model, "default").values())
    for _, layer in delta_layers(model):
        assert (layer.kind == "norm") == isinstance(layer, SptAdapterNormLayer)
