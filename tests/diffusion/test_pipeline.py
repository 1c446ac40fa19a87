"""The verbs, on whole Stable Diffusion pipelines and real files: pictures bit for bit."""

import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from snell_diffusion.adapters import save_adapter
from snell_diffusion.diffusion import install
from snell_diffusion.diffusion import pipeline as verbs
from snell_diffusion.errors import (
    SnellaBaseError,
    SnellaError,
    SnellaKeyError,
    SnellaSchemaError,
    SnellaValueError,
)
from snell_diffusion.tuners import DeltaLayer, delta_layers
from tests.tiny_models import (
    adapt,
    fingerprint,
    picture,
    pipeline,
    sd15_unet,
    text_encoder,
)


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the UNet and the text encoder."""
    components = {"unet": adapt(sd15_unet()), "text_encoder": adapt(text_encoder())}
    return save_adapter(tmp_path_factory.mktemp("cat"), components).parent


@pytest.fixture(scope="module")
def dog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the UNet alone."""
    return save_adapter(tmp_path_factory.mktemp("dog"), {"unet": adapt(sd15_unet(), seed=5)}).parent


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return pipeline()


@pytest.fixture(scope="module")
def base() -> Tensor:
    return picture(pipeline())


@pytest.fixture(scope="module")
def cat_picture() -> Tensor:
    """What the adapter draws where it was made: no file in between."""
    made = pipeline()
    adapt(made.unet)
    adapt(made.text_encoder)
    return picture(made)


def same(pipe: Any, expected: Tensor) -> bool:
    return torch.equal(picture(pipe), expected)


TRACES = {
    *("peft_config", "_hf_peft_config_loaded"),
    *("fuse_qkv_projections", "fuse_projections", "save_pretrained"),
}


def stock(pipe: Any) -> bool:
    """No trace of an adapter: stock modules, no PEFT, no guards, no hooks."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return not any(
        isinstance(module, DeltaLayer) or TRACES & vars(module).keys() or module._forward_pre_hooks
        for model in models
        for module in model.modules()
    )


def test_load_draws_what_the_trained_modules_drew(
    pipe: StableDiffusionPipeline, cat: Path, base: Tensor, cat_picture: Tensor
) -> None:
    assert same(pipe, base)
    assert not torch.equal(base, cat_picture)
    report = pipe.load_snella_weights(cat)
    assert same(pipe, cat_picture)
    assert report.adapter_name == "default_0"
    assert report.layers == {"unet": 32, "text_encoder": 12}


@pytest.mark.parametrize("how", ["file", "text", "state dict", "bare tensors", "subfolder"])
def test_every_kind_of_source(
    how: str, pipe: StableDiffusionPipeline, cat: Path, cat_picture: Tensor
) -> None:
    from safetensors.torch import load_file

    path = cat / "pytorch_snella_weights.safetensors"
    if how == "file":
        pipe.load_snella_weights(path)
    elif how == "text":
        pipe.load_snella_weights(str(cat))
    elif how == "subfolder":
        pipe.load_snella_weights(cat.parent, weight_name=path.name, subfolder=cat.name)
    elif how == "bare tensors":
        pipe.load_snella_weights(load_file(path))
    else:
        other = pipeline()
        other.load_snella_weights(path)
        pipe.load_snella_weights(other.snella_state_dict())
    assert same(pipe, cat_picture)


def test_save_and_load_again(
    pipe: StableDiffusionPipeline, cat: Path, cat_picture: Tensor, tmp_path: Path
) -> None:
    pipe.load_snella_weights(cat, "cat")
    saved = pipe.save_snella_weights(tmp_path, metadata={"instance_prompt": "a sks cat"})
    assert saved == tmp_path / "pytorch_snella_weights.safetensors"
    again = pipeline()
    again.load_snella_weights(tmp_path, "other")
    assert same(again, cat_picture)


def test_save_needs_to_know_which(
    pipe: StableDiffusionPipeline, cat: Path, dog: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        SnellaKeyError, match=r"0 SNELLA adapters are loaded \(none\): name the one"
    ):
        pipe.save_snella_weights(tmp_path)
    pipe.load_snella_weights(cat, "cat")
    pipe.load_snella_weights(dog, "dog")
    with pytest.raises(SnellaKeyError, match=r"2 SNELLA adapters are loaded \(cat, dog\)"):
        pipe.save_snella_weights(tmp_path)
    with pytest.raises(SnellaKeyError, match="no SNELLA adapter named bird; loaded: cat, dog"):
        pipe.save_snella_weights(tmp_path, "bird")
    assert pipe.save_snella_weights(tmp_path, "dog", "d.safetensors").name == "d.safetensors"


def test_unload_leaves_the_stock_pipeline(
    pipe: StableDiffusionPipeline, cat: Path, dog: Path, base: Tensor
) -> None:
    before = fingerprint(pipe)
    pipe.load_snella_weights(cat, "cat")
    pipe.load_snella_weights(dog, "dog")
    assert not stock(pipe)
    pipe.unload_snella_weights()
    assert stock(pipe)
    assert fingerprint(pipe) == before
    assert same(pipe, base)


def test_unload_one_of_two(
    pipe: StableDiffusionPipeline, cat: Path, dog: Path, base: Tensor, cat_picture: Tensor
) -> None:
    pipe.load_snella_weights(cat, "cat")
    pipe.load_snella_weights(dog, "dog")
    pipe.unload_snella_weights("dog")
    assert pipe.get_list_snella_adapters() == {"unet": ["cat"], "text_encoder": ["cat"]}
    assert same(pipe, base)  # dog was the active one
    pipe.set_snella_adapters("cat")
    assert same(pipe, cat_picture)
    pipe.load_snella_weights(dog, "dog")
    pipe.delete_snella_adapters(["cat", "dog"])
    assert stock(pipe)


def test_strengths_and_combinations(
    pipe: StableDiffusionPipeline, cat: Path, dog: Path, base: Tensor, cat_picture: Tensor
) -> None:
    pipe.load_snella_weights(cat, "cat")
    pipe.load_snella_weights(dog, "dog")
    assert pipe.get_active_snella_adapters() == ["dog"]
    dog_picture = picture(pipe)
    pipe.set_snella_adapters(names=["cat", "dog"], weights=[1.0, 0.5])
    assert pipe.get_active_snella_adapters() == ["cat", "dog"]
    both = picture(pipe)
    assert len({hash(p.numpy().tobytes()) for p in (base, cat_picture, dog_picture, both)}) == 4
    pipe.set_snella_adapters("cat", 0.0)
    assert same(pipe, base)
    pipe.set_snella_adapters("cat", {"unet": 0.0})  # the text encoder's stays at 1
    encoder_only = picture(pipe)
    assert not torch.equal(encoder_only, base)
    assert not torch.equal(encoder_only, cat_picture)
    pipe.set_snella_adapters("cat")
    assert same(pipe, cat_picture)
    pipe.set_snella_adapters([])
    assert same(pipe, base)


def test_the_strength_given_is_the_factor_on_the_update(
    pipe: StableDiffusionPipeline, dog: Path
) -> None:
    pipe.load_snella_weights(dog, "dog")
    layer = next(layer for _, layer in delta_layers(pipe.unet))
    full = layer.get_delta_weight("dog")
    pipe.set_snella_adapters("dog", 0.25)
    assert torch.equal(layer.get_delta_weight("dog"), full * 0.25)


def test_diffusers_own_scale_and_verbs_act_on_our_layers(
    pipe: StableDiffusionPipeline, dog: Path, base: Tensor
) -> None:
    pipe.load_snella_weights(dog, "dog")
    full = picture(pipe)
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.set_snella_adapters("dog", 0.5)
    assert same(pipe, half)
    pipe.set_adapters("dog", 1.0)
    assert same(pipe, full)
    pipe.disable_lora()
    assert same(pipe, base)
    pipe.enable_lora()
    assert same(pipe, full)


def test_switch_off_and_on(
    pipe: StableDiffusionPipeline, cat: Path, base: Tensor, cat_picture: Tensor
) -> None:
    pipe.load_snella_weights(cat)
    pipe.disable_snella()
    assert same(pipe, base)
    assert pipe.get_active_snella_adapters() == ["default_0"]
    pipe.enable_snella()
    assert same(pipe, cat_picture)
    assert not any(p.requires_grad for p in pipe.unet.parameters() if p.ndim == 3)


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key.replace('.base_layer', '')}": tensor.clone()
        for name in ("unet", "text_encoder", "vae")
        for key, tensor in getattr(pipe, name).state_dict().items()
        if "snella_" not in key
    }


def test_fuse_then_unfuse_restores_every_bit(
    pipe: StableDiffusionPipeline, cat: Path, cat_picture: Tensor
) -> None:
    before = weights(pipe)
    pipe.load_snella_weights(cat)
    errors = pipe.fuse_snella()
    assert errors.keys() == {"unet", "text_encoder"}
    assert max(errors.values()) < 1e-5
    fused = weights(pipe)
    assert sum(not torch.equal(before[key], fused[key]) for key in before) == 44
    torch.testing.assert_close(picture(pipe), cat_picture, rtol=0, atol=1e-4)
    pipe.unfuse_snella()
    after = weights(pipe)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert same(pipe, cat_picture)


@pytest.mark.parametrize("scale", [0.5, 0.3, 0.0, -1.0])
def test_fusing_at_a_strength_leaves_the_adapter_at_its_own(
    scale: float, pipe: StableDiffusionPipeline, dog: Path, base: Tensor
) -> None:
    pipe.load_snella_weights(dog, "dog")
    full = picture(pipe)
    pipe.set_snella_adapters("dog", scale)
    scaled = picture(pipe)
    pipe.set_snella_adapters("dog", 1.0)
    pipe.fuse_snella(scale)
    torch.testing.assert_close(picture(pipe), scaled, rtol=0, atol=1e-4)
    pipe.unfuse_snella()
    assert same(pipe, full)
    assert {layer.scaling["dog"] for _, layer in delta_layers(pipe.unet)} == {1.0}


def test_fuse_chosen_components_and_adapters(
    pipe: StableDiffusionPipeline, cat: Path, dog: Path, base: Tensor
) -> None:
    pipe.load_snella_weights(cat, "cat")
    pipe.load_snella_weights(dog, "dog")
    assert pipe.fuse_snella(components=["unet"], adapter_names="cat").keys() == {"unet"}
    assert not any(layer.merged for _, layer in delta_layers(pipe.text_encoder))
    with pytest.raises(SnellaValueError, match="nothing is fused in text_encoder"):
        pipe.unfuse_snella(["text_encoder"])
    pipe.unfuse_snella(["unet"])
    pipe.unload_snella_weights()
    assert same(pipe, base)


def test_unload_unfuses_first(pipe: StableDiffusionPipeline, cat: Path, base: Tensor) -> None:
    pipe.load_snella_weights(cat)
    pipe.fuse_snella(0.7)
    pipe.unload_snella_weights()
    assert stock(pipe)
    assert same(pipe, base)


def test_while_fused_nothing_else_changes(pipe: StableDiffusionPipeline, cat: Path) -> None:
    pipe.load_snella_weights(cat, "cat")
    pipe.fuse_snella()
    before = picture(pipe)
    for verb, arguments, what in [
        ("fuse_snella", (), "fuse again"),
        ("set_snella_adapters", ("cat", 0.5), "change the active adapters"),
        ("set_snella_sparsity", (0.5,), "change the sparsity"),
        ("disable_snella", (), "switch adapters off"),
        ("delete_snella_adapters", ("cat",), "delete adapters"),
        ("unload_snella_weights", ("cat",), "unload 'cat'"),
    ]:
        message = f"cannot {what} while cat is fused into the weights: call unfuse_snella.. first"
        with pytest.raises(SnellaValueError, match=message):
            getattr(pipe, verb)(*arguments)
    assert same(pipe, before)


def test_a_fusion_that_would_break_weights_fuses_nothing(
    pipe: StableDiffusionPipeline, cat: Path
) -> None:
    pipe.load_snella_weights(cat, "cat")
    before = weights(pipe)
    last = list(delta_layers(pipe.unet))[-1][1]
    with torch.no_grad():
        last.snella_A["cat"].mul_(1e25)
    with pytest.raises(SnellaValueError, match=r"would write NaN or infinite .*no layer was fused"):
        pipe.fuse_snella(0.5)
    after = weights(pipe)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(layer.merged for _, layer in delta_layers(pipe.unet))
    assert {layer.scaling["cat"] for _, layer in delta_layers(pipe.unet)} == {1.0}


def test_fusing_what_is_switched_off_is_refused(pipe: StableDiffusionPipeline, cat: Path) -> None:
    pipe.load_snella_weights(cat)
    pipe.disable_snella()
    with pytest.raises(SnellaValueError, match=r"switched off: call enable_snella\(\) before"):
        pipe.fuse_snella()


def test_sparsity_slides_and_comes_back(
    pipe: StableDiffusionPipeline, cat: Path, base: Tensor, cat_picture: Tensor
) -> None:
    pipe.load_snella_weights(cat)
    trained = {path: layer.sparsity("default_0") for path, layer in delta_layers(pipe.unet)}
    distances = []
    for level in (0.0, 0.9, 0.99, 1.0):
        pipe.set_snella_sparsity(level)
        distances.append(float((picture(pipe) - base).abs().mean()))
        for _, layer in delta_layers(pipe.unet):
            size = layer.in_features * layer.out_features
            zeros = int((layer.get_delta_weight("default_0") == 0).sum())
            assert abs(zeros / size - level) <= 2 / size
    assert distances[0] > distances[2] > distances[3] == 0
    assert same(pipe, base)  # level 1: no update is left
    pipe.set_snella_sparsity(None)
    assert same(pipe, cat_picture)
    restored = {path: layer.sparsity("default_0") for path, layer in delta_layers(pipe.unet)}
    assert restored == trained


def test_setting_the_level_an_adapter_has_changes_no_bit(pipe: StableDiffusionPipeline) -> None:
    adapt(pipe.unet, "flat")
    pipe.set_snella_sparsity(0.3)
    before = picture(pipe)
    pipe.set_snella_sparsity(0.3)
    assert same(pipe, before)
    pipe.set_snella_sparsity(None, "flat")
    pipe.set_snella_sparsity(None, "flat")
    assert not same(pipe, before)


def test_a_stored_threshold_comes_back_too(pipe: StableDiffusionPipeline) -> None:
    adapt(pipe.unet, "a")
    layer = next(layer for _, layer in delta_layers(pipe.unet))
    value = layer.store_threshold("a")
    pipe.set_snella_sparsity(0.9)
    assert layer.current_threshold("a") > value
    pipe.set_snella_sparsity(None)
    assert layer.current_threshold("a") == value


def test_levels_of_an_unloaded_adapter_are_forgotten(
    pipe: StableDiffusionPipeline, dog: Path, cat: Path
) -> None:
    pipe.load_snella_weights(cat, "k")  # keeps the layers in place
    pipe.load_snella_weights(dog, "d")
    trained = picture(pipe)
    pipe.set_snella_sparsity(0.9, "d")
    pipe.unload_snella_weights("d")
    pipe.load_snella_weights(dog, "d")
    pipe.set_snella_sparsity(None)
    assert same(pipe, trained)


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan"), "0.5", True + 1])
def test_levels_out_of_range(level: Any, pipe: StableDiffusionPipeline, dog: Path) -> None:
    pipe.load_snella_weights(dog)
    with pytest.raises(SnellaValueError, match=r"level must be 0 .dense. to 1 .no update. or None"):
        pipe.set_snella_sparsity(level)


def test_an_adapter_that_keeps_everything_has_no_levels(pipe: StableDiffusionPipeline) -> None:
    adapt(pipe.text_encoder, "sparse")
    torch.manual_seed(0)
    from peft import inject_adapter_in_model

    from snell_diffusion import SnellaConfig

    inject_adapter_in_model(SnellaConfig(r=4, sparsify="none"), pipe.unet, "dense")
    before = picture(pipe)
    with pytest.raises(SnellaValueError, match="'dense' was trained with sparsify='none'"):
        pipe.set_snella_sparsity(0.5)
    assert same(pipe, before)
    pipe.set_snella_sparsity(0.0, "dense")
    assert same(pipe, before)


@pytest.mark.parametrize(
    "verb, arguments",
    [
        ("set_snella_adapters", ("x",)),
        ("delete_snella_adapters", ("x",)),
        ("unload_snella_weights", ("x",)),
        ("set_snella_sparsity", (0.5, "x")),
        ("fuse_snella", (1.0, None, "x")),
        ("snella_state_dict", ("x",)),
    ],
)
def test_unknown_names_list_the_known_ones(
    verb: str, arguments: tuple[Any, ...], pipe: StableDiffusionPipeline, dog: Path
) -> None:
    pipe.load_snella_weights(dog, "dog")
    before = fingerprint(pipe)
    with pytest.raises(SnellaKeyError, match="no SNELLA adapter named x; loaded: dog"):
        getattr(pipe, verb)(*arguments)
    assert fingerprint(pipe) == before


@pytest.mark.parametrize(
    "verb, arguments",
    [
        ("fuse_snella", ()),
        ("enable_snella", ()),
        ("disable_snella", ()),
        ("set_snella_sparsity", (0.5,)),
    ],
)
def test_verbs_without_an_adapter_say_so(
    verb: str, arguments: tuple[Any, ...], pipe: StableDiffusionPipeline
) -> None:
    with pytest.raises(SnellaKeyError, match="no SNELLA adapter is loaded: call load_snella"):
        getattr(pipe, verb)(*arguments)
    assert pipe.get_active_snella_adapters() == []
    assert pipe.get_list_snella_adapters() == {}
    pipe.unload_snella_weights()


@pytest.mark.parametrize(
    "weight, error, message",
    [
        ([1.0, 2.0], SnellaValueError, "1 adapters, but 2 weights"),
        (float("nan"), SnellaValueError, "weight for .* must be a finite number, got nan"),
        ("strong", SnellaValueError, "1 adapters, but 6 weights"),
        ({"unet": "much"}, SnellaValueError, "weight for unet must be a finite number, got 'much'"),
        (
            {"u-net": 1.0},
            SnellaKeyError,
            "no component u-net; this pipeline has text_encoder, unet",
        ),
    ],
)
def test_weights_that_are_none(
    weight: Any, error: type[SnellaError], message: str, pipe: StableDiffusionPipeline, dog: Path
) -> None:
    pipe.load_snella_weights(dog, "dog")
    before = fingerprint(pipe)
    with pytest.raises(error, match=message):
        pipe.set_snella_adapters("dog", weight)
    assert fingerprint(pipe) == before


def test_fuse_arguments_are_checked(pipe: StableDiffusionPipeline, dog: Path) -> None:
    pipe.load_snella_weights(dog, "dog")
    with pytest.raises(SnellaKeyError, match="no component transformer; this pipeline has"):
        pipe.fuse_snella(components=["transformer"])
    with pytest.raises(SnellaValueError, match="scale must be a finite number, got inf"):
        pipe.fuse_snella(float("inf"))
    with pytest.raises(SnellaKeyError, match="no layer has an adapter named dog"):
        pipe.fuse_snella(components=["vae"])
    with pytest.raises(SnellaValueError, match="nothing is fused in"):
        pipe.unfuse_snella()


def test_a_refused_load_leaves_the_pipeline_alone(
    pipe: StableDiffusionPipeline, cat: Path, tmp_path: Path, cat_picture: Tensor
) -> None:
    pipe.load_snella_weights(cat, "cat")
    lora = tmp_path / "lora.safetensors"
    from safetensors.torch import save_file

    save_file({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}, lora)
    wide = save_adapter(tmp_path, {"unet": adapt(sd15_unet(cross_attention_dim=64))})
    flux = {"transformer." + k.removeprefix("unet."): v for k, v in _bare(cat).items()}
    before = fingerprint(pipe)
    for source, name, error, message in [
        (lora, "x", SnellaError, "not a SNELLA adapter"),
        (wide, "x", SnellaBaseError, "with other settings"),
        (flux, "x", SnellaKeyError, "adapts 'transformer'"),
        ({}, "x", SnellaKeyError, "among nothing"),
        (cat, "cat", SnellaKeyError, "'cat' is already in use"),
        (cat, "a.b", SnellaValueError, "expected 1 to 64 letters"),
        (_bare(cat) | {"unet.snella_method": torch.zeros(2)}, "x", SnellaSchemaError, "4, 3"),
    ]:
        with pytest.raises(error, match=message):
            pipe.load_snella_weights(source, name)
        assert fingerprint(pipe) == before
    assert same(pipe, cat_picture)


def _bare(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "pytorch_snella_weights.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("text_")}


def test_it_shares_a_pipeline_with_a_lora(
    pipe: StableDiffusionPipeline, dog: Path, base: Tensor
) -> None:
    pipe.load_snella_weights(dog, "dog")
    dog_picture = picture(pipe)
    pipe.unload_snella_weights()
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(4)
    pipe.unet.add_adapter(config, "lora")
    lora_picture = picture(pipe)
    pipe.load_snella_weights(dog, "dog")
    both = picture(pipe)
    assert len({hash(p.numpy().tobytes()) for p in (base, dog_picture, lora_picture, both)}) == 4
    pipe.unload_snella_weights()
    assert list(pipe.unet.peft_config) == ["lora"]
    assert same(pipe, lora_picture)
    pipe.load_snella_weights(dog, "dog")
    pipe.unet.delete_adapters("lora")
    torch.testing.assert_close(picture(pipe), dog_picture, rtol=0, atol=1e-4)


def test_loading_many_times_leaves_nothing_behind(
    pipe: StableDiffusionPipeline, cat: Path, cat_picture: Tensor
) -> None:
    before = fingerprint(pipe)
    dead = []
    for _ in range(5):
        pipe.load_snella_weights(cat, "cat")
        layer = next(layer for _, layer in delta_layers(pipe.unet))
        dead += [weakref.ref(layer), weakref.ref(layer.snella_A["cat"])]
        pipe.unload_snella_weights()
        del layer
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
    assert fingerprint(pipe) == before
    for _ in range(2):
        pipe.load_snella_weights(cat, "cat")
        assert same(pipe, cat_picture)
        pipe.unload_snella_weights("cat")


def test_a_copy_of_a_pipeline_is_independent(
    pipe: StableDiffusionPipeline, cat: Path, base: Tensor, cat_picture: Tensor
) -> None:
    import copy

    pipe.load_snella_weights(cat)
    twin = copy.deepcopy(pipe)
    pipe.unload_snella_weights()
    assert same(pipe, base)
    assert same(twin, cat_picture)
    with pytest.raises(SnellaValueError, match="would leave out the updates of 32 layers"):
        twin.unet.fuse_qkv_projections()
    twin.unload_snella_weights()
    assert stock(twin)
    assert same(twin, base)


def test_from_pipe_shares_the_adapter(
    pipe: StableDiffusionPipeline, cat: Path, cat_picture: Tensor
) -> None:
    pipe.load_snella_weights(cat)
    other = StableDiffusionPipeline.from_pipe(pipe)
    assert other.get_active_snella_adapters() == ["default_0"]


def test_functions_and_methods_take_the_same_arguments() -> None:
    for name in install.VERBS:
        first = next(iter(inspect.signature(getattr(verbs, name)).parameters))
        assert first == "pipe"
