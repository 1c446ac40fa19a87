"""What every verb does on every family: exact against weights merged by hand."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snell_diffusion.diffusion import families as training_families
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners import DeltaLayer
from tests.registry.families import MODULES, REGISTRY
from tests.registry.made import Made, with_weights
from tests.registry.record import predict
from tests.tiny_models import hash_bytes


def loaded(made: Made, *names: str) -> tuple[Any, nn.Module]:
    """The family's stock pipeline with adapters loaded in order, and its denoiser."""
    pipe = made.family.pipe()
    for name in names:
        pipe.load_snella_weights(made.files[name], name)
    return pipe, getattr(pipe, made.family.component)


def bits(model: nn.Module) -> dict[str, str]:
    return {name: hash_bytes(tensor) for name, tensor in model.state_dict().items()}


def test_the_registry_has_what_is_promised() -> None:
    assert len(REGISTRY) == sum(len(module.FAMILIES) for module in MODULES)  # no name twice
    assert len(REGISTRY) >= 24
    in_tests = {name for family in REGISTRY.values() for name in family.pipelines}
    for family in training_families.families().values():
        assert set(family.pipelines) & in_tests, f"{family.name}: no tiny denoiser here"


def test_load_and_unload(made: Made) -> None:
    family = made.family
    pipe, model = loaded(made)
    stock = bits(model)
    assert torch.equal(predict(family, model), made.base)
    report = pipe.load_snella_weights(made.files["a"])
    assert report.layers == {family.component: len(made.deltas["a"])}
    expected = made.merged({"a": 1.0})
    assert not torch.equal(expected, made.base)
    assert torch.equal(predict(family, model), expected)
    pipe.unload_snella_weights()
    assert not any(isinstance(module, DeltaLayer) for module in model.modules())
    assert bits(model) == stock
    assert torch.equal(predict(family, model), made.base)


def test_every_layer_takes_part(made: Made) -> None:
    """No Linear's update is left out by a module that reads its weight past the layer."""
    by_layer = {path: {path: delta} for path, delta in made.deltas["a"].items()}
    _, model = loaded(made, "a")
    layers = {path: model.get_submodule(path) for path in by_layer}
    path = list(by_layer)[len(by_layer) // 2]
    for other, layer in layers.items():
        layer.set_scale("a", 1.0 if other == path else 0.0)
    expected = predict(made.family, with_weights(made.family, by_layer[path]))
    assert torch.equal(predict(made.family, model), expected)


def test_fuse_and_unfuse(made: Made) -> None:
    family = made.family
    pipe, model = loaded(made, "a")
    before = bits(model)
    pipe.fuse_snella()
    assert torch.equal(predict(family, model), made.merged({"a": 1.0}))
    pipe.unfuse_snella()
    assert bits(model) == before
    pipe.fuse_snella(0.5)
    assert torch.equal(predict(family, model), made.merged({"a": 0.5}))
    pipe.unfuse_snella()
    assert bits(model) == before
    assert torch.equal(predict(family, model), made.merged({"a": 1.0}))


def test_strength(made: Made) -> None:
    family = made.family
    pipe, model = loaded(made, "a")
    half = made.merged({"a": 0.5})
    pipe.set_snella_adapters("a", 0.5)
    assert torch.equal(predict(family, model), half)
    pipe.set_snella_adapters("a", 0.0)
    assert torch.equal(predict(family, model), made.base)
    pipe.set_snella_adapters("a")
    full = predict(family, model)
    assert torch.equal(full, made.merged({"a": 1.0}))
    if family.scale_kwarg is not None:
        assert torch.equal(predict(family, model, **{family.scale_kwarg: {"scale": 0.5}}), half)
    else:  # diffusers has no such argument here, or does nothing with it
        for name in inspect.signature(type(model).forward).parameters:
            if name.endswith("attention_kwargs"):
                assert torch.equal(predict(family, model, **{name: {"scale": 0.5}}), full)
    assert torch.equal(predict(family, model), full)


def test_another_sparsity(made: Made) -> None:
    family = made.family
    pipe, model = loaded(made, "a")
    pipe.set_snella_sparsity(0.9)
    assert torch.equal(predict(family, model), predict(family, with_weights(family, made.sparse)))
    pipe.set_snella_sparsity(1.0)
    assert torch.equal(predict(family, model), made.base)
    pipe.set_snella_sparsity(None)
    assert torch.equal(predict(family, model), made.merged({"a": 1.0}))


def test_two_adapters(made: Made) -> None:
    family = made.family
    pipe, model = loaded(made, "a", "b")
    assert torch.equal(predict(family, model), made.merged({"b": 1.0}))
    pipe.set_snella_adapters(["a", "b"], [0.5, -0.25])
    assert torch.equal(predict(family, model), made.merged({"a": 0.5, "b": -0.25}))
    pipe.disable_snella()
    assert torch.equal(predict(family, model), made.base)
    pipe.enable_snella()
    pipe.set_snella_adapters("a")
    assert torch.equal(predict(family, model), made.merged({"a": 1.0}))
    pipe.delete_snella_adapters("a")
    assert torch.equal(predict(family, model), made.base)
    pipe.set_snella_adapters("b")
    assert torch.equal(predict(family, model), made.merged({"b": 1.0}))


def test_saving(made: Made, tmp_path: Path) -> None:
    family = made.family
    pipe, model = loaded(made, "a")
    with pytest.raises(SnellaValueError, match="under names that from_pretrained"):
        model.save_pretrained(tmp_path / "model")
    pipe.save_snella_weights(tmp_path / "adapter")
    again, twin = loaded(made)
    again.load_snella_weights(tmp_path / "adapter")
    assert torch.equal(predict(family, twin), made.merged({"a": 1.0}))


def test_a_copy_is_independent(made: Made) -> None:
    family = made.family
    pipe, model = loaded(made, "a")
    twin = copy.deepcopy(model)
    pipe.unload_snella_weights()
    assert torch.equal(predict(family, twin), made.merged({"a": 1.0}))
    assert torch.equal(predict(family, model), made.base)


def test_qkv_fusion_is_refused_or_keeps_what_is_fused(made: Made) -> None:
    family = made.family
    if not family.fuses_qkv:  # no such method, or one that fails on the bare model
        with pytest.raises(AttributeError):
            family.build().fuse_qkv_projections()
        return
    pipe, model = loaded(made, "a")
    expected = made.merged({"a": 1.0})
    with pytest.raises(SnellaValueError, match=r"would leave out the updates of \d+ layers"):
        model.fuse_qkv_projections()
    assert torch.equal(predict(family, model), expected)
    pipe.fuse_snella()
    model.fuse_qkv_projections()
    torch.testing.assert_close(predict(family, model), expected, rtol=1e-3, atol=1e-4)
    model.unfuse_qkv_projections()
    pipe.unfuse_snella()
    assert torch.equal(predict(family, model), expected)
