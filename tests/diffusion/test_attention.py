"""SnellaAttnProcessor: the tuner layers' own bits, from stock modules, whatever is done to them."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from peft import LoraConfig
from torch import Tensor, nn

from snell_diffusion import SnellaAttnProcessor
from snell_diffusion.adapters import save_adapter
from snell_diffusion.errors import SnellaKeyError, SnellaValueError
from snell_diffusion.tuners import DeltaLayer, delta_layers
from tests.tiny_models import (
    DENOISERS,
    adapt,
    denoiser_inputs,
    fingerprint,
    picture,
    pipeline,
    predict,
    sd15_unet,
)

FAMILIES = list(DENOISERS)
ATTENTIONS = {"sd15": 8, "sdxl": 16, "sd3": 2, "flux": 2}


class Pipe:
    """A model in the form `fingerprint` takes."""

    def __init__(self, model: nn.Module) -> None:
        self.components = {"model": model}


def stock_types(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_both_forms_predict_the_same_bits(family: str) -> None:
    model = adapt(DENOISERS[family]())
    base = predict(DENOISERS[family](), family)
    expected = predict(model, family)
    assert not torch.equal(expected, base)
    assert SnellaAttnProcessor.install(model) == ATTENTIONS[family]
    assert torch.equal(predict(model, family), expected)
    assert stock_types(model) == stock_types(DENOISERS[family]())
    assert model.state_dict().keys() == DENOISERS[family]().state_dict().keys()


def test_installing_and_removing_leaves_no_trace(family: str) -> None:
    model = adapt(DENOISERS[family]())
    expected = predict(model, family)
    before = fingerprint(Pipe(model))
    SnellaAttnProcessor.install(model)
    predict(model, family)
    assert SnellaAttnProcessor.remove(model) == ATTENTIONS[family]
    assert fingerprint(Pipe(model)) == before
    assert torch.equal(predict(model, family), expected)
    assert SnellaAttnProcessor.remove(model) == 0


def test_every_projection_is_covered(family: str) -> None:
    """Each projection's update alone moves the prediction, in both forms by the same bits."""
    model = adapt(DENOISERS[family]())
    layers = dict(delta_layers(model))
    names = {path.split("attn")[-1].partition(".")[2] for path in layers}
    added = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    wanted = {"to_q", "to_k", "to_v", "to_out.0"} | (added if family in ("sd3", "flux") else set())
    assert names == wanted
    for name in names:
        for path, layer in layers.items():
            layer.set_scale("default", 1.0 if path.endswith(name) else 0.0)
        expected = predict(model, family)
        assert not torch.equal(expected, predict(DENOISERS[family](), family))
        SnellaAttnProcessor.install(model)
        assert torch.equal(predict(model, family), expected)
        SnellaAttnProcessor.remove(model)


def test_layers_outside_attention_stay_tuner_layers() -> None:
    model = adapt(sd15_unet(), target_modules=["to_q", "ff.net.2"])
    expected = predict(model, "sd15")
    SnellaAttnProcessor.install(model)
    assert {path.rpartition("ff.")[2] for path, _ in delta_layers(model)} == {"net.2"}
    assert torch.equal(predict(model, "sd15"), expected)


def test_gradients_reach_the_factors() -> None:
    def gradients(installed: bool) -> list[Tensor]:
        model = adapt(sd15_unet())
        layers = [layer for _, layer in delta_layers(model)]
        if installed:
            SnellaAttnProcessor.install(model)
        model(**denoiser_inputs("sd15"), return_dict=False)[0].square().mean().backward()
        return [layer.snella_A["default"].grad for layer in layers]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_the_class_is_a_subclass_with_the_signature_and_state_of_its_base(family: str) -> None:
    model = adapt(DENOISERS[family]())
    before = dict(model.attn_processors)
    SnellaAttnProcessor.install(model)
    for name, processor in model.attn_processors.items():
        base = before[name]
        assert isinstance(processor, SnellaAttnProcessor)
        assert isinstance(processor, type(base))
        assert type(processor).__name__ == f"Snella{type(base).__name__}"
        assert inspect.signature(processor.__call__) == inspect.signature(base.__call__)
        assert vars(base).items() <= vars(processor).items()


def installed_unet() -> tuple[Any, Tensor]:
    model = adapt(sd15_unet())
    expected = predict(model, "sd15")
    SnellaAttnProcessor.install(model)
    return model, expected


def tuner_prediction(change: Any) -> Tensor:
    """What the tuner form predicts after the same change."""
    model = adapt(sd15_unet())
    change(model)
    return predict(model, "sd15")


CHANGES = {
    "attention slicing": lambda unet: unet.set_attention_slice(2),
    "slicing on and off": lambda unet: (unet.set_attention_slice(1), unet.set_attention_slice(4)),
    "one processor for all": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "a table of processors": lambda unet: unet.set_attn_processor(
        {name: AttnProcessor2_0() for name in unet.attn_processors}
    ),
    "its own processors": lambda unet: unet.set_attn_processor(dict(unet.attn_processors)),
    "its own processors, reset": lambda unet: unet.set_attn_processor(
        {name: processor.__class__() for name, processor in unet.attn_processors.items()}
    ),
    "by assignment": lambda unet: setattr(
        unet.mid_block.attentions[0].transformer_blocks[0].attn1, "processor", AttnProcessor()
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_updates_survive_other_processors(name: str) -> None:
    model, _ = installed_unet()
    CHANGES[name](model)
    assert torch.equal(predict(model, "sd15"), tuner_prediction(CHANGES[name]))
    SnellaAttnProcessor.remove(model)
    assert torch.equal(predict(model, "sd15"), tuner_prediction(CHANGES[name]))
    assert not any(isinstance(p, SnellaAttnProcessor) for p in model.attn_processors.values())


def test_what_was_set_while_installed_stays_after_removal() -> None:
    model, _ = installed_unet()
    model.set_attention_slice(2)
    predict(model, "sd15")
    SnellaAttnProcessor.remove(model)
    assert all(type(p) is SlicedAttnProcessor for p in model.attn_processors.values())


def test_default_processors_keep_the_updates_or_raise() -> None:
    model, expected = installed_unet()
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
        model.set_default_attn_processor()
    assert torch.equal(predict(model, "sd15"), expected)
    flux = adapt(DENOISERS["flux"]())
    expected = predict(flux, "flux")
    SnellaAttnProcessor.install(flux)
    for module in flux.modules():
        if hasattr(type(module), "_default_processor_cls"):
            module.set_processor(module._default_processor_cls())
    assert torch.equal(predict(flux, "flux"), expected)


def test_one_of_our_processors_on_another_block_brings_no_foreign_update() -> None:
    model, expected = installed_unet()
    stranger = next(iter(model.attn_processors.values()))
    bare = sd15_unet()
    bare.set_attn_processor(stranger)
    assert torch.equal(predict(bare, "sd15"), predict(sd15_unet(), "sd15"))
    model.set_attn_processor(stranger)
    assert torch.equal(predict(model, "sd15"), expected)


def test_fusion_of_projections_is_refused(family: str) -> None:
    model = adapt(DENOISERS[family]())
    expected = predict(model, family)
    SnellaAttnProcessor.install(model)
    with pytest.raises(SnellaValueError, match=r"would leave out the updates of \d+ layers"):
        model.fuse_qkv_projections()
    attn = next(m for m in model.modules() if hasattr(m, "processor"))
    with pytest.raises(SnellaValueError, match=r"fuse_projections\(\) would leave out"):
        attn.fuse_projections()
    assert torch.equal(predict(model, family), expected)


def test_a_fused_model_takes_no_processors() -> None:
    model = adapt(sd15_unet())
    for _, layer in delta_layers(model):
        layer.merge()
    model.fuse_qkv_projections()
    with pytest.raises(SnellaValueError, match="fused QKV projections, which a processor cannot"):
        SnellaAttnProcessor.install(model)
    assert isinstance(next(iter(model.attn_processors.values())), FusedAttnProcessor2_0)


def test_nothing_to_install_is_an_error() -> None:
    with pytest.raises(SnellaKeyError, match="no attention projection of UNet2DConditionModel has"):
        SnellaAttnProcessor.install(sd15_unet())
    model, _ = installed_unet()
    with pytest.raises(
        SnellaKeyError, match="has a SNELLA adapter that is not installed yet: load"
    ):
        SnellaAttnProcessor.install(model)
    with pytest.raises(SnellaKeyError, match="no attention projection"):
        SnellaAttnProcessor.install(adapt(sd15_unet(), target_modules=["ff.net.2"]))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_lora_added_beneath_is_kept() -> None:
    def lora(model: Any) -> None:
        torch.manual_seed(2)
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        model.add_adapter(config, "lora")

    model, expected = installed_unet()
    lora(model)
    with_lora = predict(model, "sd15")
    assert not torch.equal(with_lora, expected)
    SnellaAttnProcessor.remove(model)
    assert torch.equal(predict(model, "sd15"), with_lora)
    SnellaAttnProcessor.install(model)
    model.unload_lora()
    assert torch.equal(predict(model, "sd15"), expected)


def test_a_copy_has_its_own_updates() -> None:
    model, expected = installed_unet()
    twin = copy.deepcopy(model)
    SnellaAttnProcessor.remove(model)
    for _, layer in delta_layers(model):
        layer.set_scale("default", 0.0)
    assert torch.equal(predict(twin, "sd15"), expected)
    assert SnellaAttnProcessor.remove(twin) == 8
    assert len(list(delta_layers(twin))) == 32


def test_save_pretrained_writes_a_stock_model(tmp_path: Path) -> None:
    model, _ = installed_unet()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(predict(again, "sd15"), predict(sd15_unet(), "sd15"))


def test_attributes_set_on_the_processor_reach_the_base() -> None:
    model = adapt(DENOISERS["flux"]())
    SnellaAttnProcessor.install(model)
    model.set_attention_backend("native")
    chosen = {p._attention_backend for p in model.attn_processors.values()}
    assert len(chosen) == 1
    assert None not in chosen
    SnellaAttnProcessor.remove(model)
    assert {p._attention_backend for p in model.attn_processors.values()} == chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("a"), {"unet": adapt(sd15_unet())}).parent


def test_pictures_are_equal_bit_for_bit(folder: Path) -> None:
    pipe = pipeline()
    base = picture(pipe)
    pipe.load_snella_weights(folder)
    expected = picture(pipe)
    SnellaAttnProcessor.install(pipe.unet)
    assert torch.equal(picture(pipe), expected)
    pipe.enable_attention_slicing(1)
    sliced = picture(pipe)
    assert not torch.equal(sliced, base)
    torch.testing.assert_close(sliced, expected, rtol=0, atol=1e-4)
    pipe.disable_attention_slicing()
    assert torch.equal(picture(pipe), expected)
    with pytest.raises(SnellaValueError, match="would leave out the updates"):
        pipe.fuse_qkv_projections()
    assert torch.equal(picture(pipe), expected)


def test_all_verbs_work_on_the_processor_form(folder: Path) -> None:
    """Every verb does to the processor form what it does to the tuner form."""

    def story(install: bool) -> list[Tensor]:
        pipe = pipeline()
        pipe.load_snella_weights(folder, "a")
        if install:
            SnellaAttnProcessor.install(pipe.unet)
        pictures = []

        def step(verb: str, *arguments: Any) -> None:
            getattr(pipe, verb)(*arguments)
            pictures.append(picture(pipe))
            layers = any(isinstance(module, DeltaLayer) for module in pipe.unet.modules())
            assert layers is not install or pipe.get_list_snella_adapters() == {}

        step("set_snella_adapters", "a", 0.5)
        step("set_snella_sparsity", 0.9)
        step("set_snella_sparsity", None)
        step("fuse_snella", 0.5)
        step("unfuse_snella")
        step("disable_snella")
        step("enable_snella")
        step("load_snella_weights", folder, "b")
        step("set_snella_adapters", ["a", "b"])
        step("unload_snella_weights", "a")
        assert pipe.get_list_snella_adapters() == {"unet": ["b"]}
        step("set_snella_adapters", "b")
        step("unload_snella_weights")
        return pictures

    for one, other in zip(story(True), story(False), strict=True):
        assert torch.equal(one, other)


def test_unloading_takes_the_processors_off(folder: Path) -> None:
    pipe: StableDiffusionPipeline = pipeline()
    before = fingerprint(pipe)
    pipe.load_snella_weights(folder)
    SnellaAttnProcessor.install(pipe.unet)
    pipe.unload_snella_weights()
    assert fingerprint(pipe) == before


def test_layer_skipping_knows_the_generated_classes() -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    model, _ = installed_unet()
    flux = adapt(DENOISERS["flux"]())
    SnellaAttnProcessor.install(flux)
    for processor in [*model.attn_processors.values(), *flux.attn_processors.values()]:
        base = type(processor).__bases__[1]
        assert AttentionProcessorRegistry.get(type(processor)) is AttentionProcessorRegistry.get(
            base
        )


def test_factors_follow_the_weights_to_another_device() -> None:
    model, _ = installed_unet()
    model.to("meta")
    attn = next(m for m in model.modules() if hasattr(m, "processor"))
    views = attn.processor.snella_keeper.overrides()
    assert views["to_q"].snella_A["default"].device.type == "meta"


def test_ip_adapter_on_top_keeps_the_updates() -> None:
    """It replaces cross-attention processors by modules and makes the others anew by class."""
    model, _ = installed_unet()
    torch.manual_seed(0)
    processors = {
        name: IPAdapterAttnProcessor2_0(32, cross_attention_dim=32, num_tokens=(4,))
        if "attn2" in name
        else processor.__class__()
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    inputs = denoiser_inputs("sd15")
    inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], [torch.randn(2, 1, 4, 32)])
    with torch.no_grad():
        installed = model(**inputs, return_dict=False)[0]
        names = [name for name in model.state_dict() if ".processor." in name]
        SnellaAttnProcessor.remove(model)
        assert torch.equal(model(**inputs, return_dict=False)[0], installed)
        assert [name for name in model.state_dict() if ".processor." in name] == names
        for _, layer in delta_layers(model):
            layer.set_scale("default", 0.0)
        assert not torch.equal(model(**inputs, return_dict=False)[0], installed)
    assert len(names) == 8


@pytest.mark.parametrize("installed", [False, True])
def test_a_whole_model_compiles_in_one_graph(installed: bool) -> None:
    model = adapt(DENOISERS["flux"]())
    expected = predict(model, "flux")
    if installed:
        SnellaAttnProcessor.install(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(predict(compiled, "flux"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_forms_agree_in_16_bits(dtype: torch.dtype) -> None:
    model = adapt(DENOISERS["flux"]().to(dtype))
    inputs = {name: tensor.to(dtype) for name, tensor in denoiser_inputs("flux").items()}
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        SnellaAttnProcessor.install(model)
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)
        assert not torch.equal(DENOISERS["flux"]().to(dtype)(**inputs)[0], expected)
