"""Loading: exact when it works, and without a trace when it is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from snell_diffusion.adapters import (
    AdapterFile,
    adapter_file_bytes,
    check_adapter_name,
    load_adapter,
    read_adapter,
)
from snell_diffusion.adapters import load as load_module
from snell_diffusion.errors import (
    SnellaBaseError,
    SnellaConfigError,
    SnellaError,
    SnellaKeyError,
    SnellaShapeError,
    SnellaValueError,
)
from snell_diffusion.tuners import DeltaLayer, delta_layers
from tests.adapters.files import rebuilt
from tests.tiny_models import adapt, fingerprint, predict, sd15_unet, text_encoder

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


class Models:
    """What a pipeline is to a loader."""

    def __init__(self) -> None:
        self.components: dict[str, nn.Module] = {
            "unet": sd15_unet(),
            "text_encoder": text_encoder(),
        }


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def expected(adapted: dict[str, nn.Module]) -> Tensor:
    return predict(adapted["unet"], "sd15")


def test_a_loaded_adapter_predicts_the_same_bits(
    adapter_file: AdapterFile, models: Models, expected: Tensor
) -> None:
    report = load_adapter(models.components, adapter_file, "mine")
    assert torch.equal(predict(models.components["unet"], "sd15"), expected)
    assert report.adapter_name == "mine"
    assert report.layers == {"unet": 32, "text_encoder": 12}
    assert report.base_matches == {"unet": True, "text_encoder": True}
    assert 0.01 < report.largest_update < 1


def test_saving_again_gives_the_same_file(adapter_file: AdapterFile, models: Models) -> None:
    load_adapter(models.components, adapter_file, "mine")
    again = adapter_file_bytes(
        models.components,
        "mine",
        adapter_file.header.metadata,
        adapter_file.header.origin.model_dump(),
    )
    assert read_adapter(again).digest == adapter_file.digest


def test_half_precision_files_load_into_float32(models: Models) -> None:
    unet = adapt(sd15_unet())
    file = read_adapter(adapter_file_bytes({"unet": unet}, dtype=torch.float16))
    load_adapter(models.components, file)
    layer = dict(delta_layers(models.components["unet"]))[LAYER]
    assert layer.snella_A["default"].dtype == torch.float32
    assert torch.equal(
        layer.snella_A["default"],
        dict(delta_layers(unet))[LAYER].snella_A["default"].half().float(),
    )


def test_a_16_bit_base_keeps_float32_factors(adapter_file: AdapterFile) -> None:
    components = {"unet": sd15_unet().bfloat16(), "text_encoder": text_encoder()}
    load_adapter(components, adapter_file)
    layer = dict(delta_layers(components["unet"]))[LAYER]
    assert layer.snella_A["default"].dtype == torch.float32
    assert layer.snella_sparsity["default"].dtype == torch.float64


def test_stored_thresholds_are_used(models: Models) -> None:
    unet = adapt(sd15_unet())
    for _, layer in delta_layers(unet):
        layer.store_threshold("default")
    load_adapter(models.components, read_adapter(adapter_file_bytes({"unet": unet})))
    twins = dict(delta_layers(models.components["unet"]))
    for path, layer in delta_layers(unet):
        assert twins[path].current_threshold("default") == layer.current_threshold("default")


def test_loading_leaves_trainability_and_random_state_alone(models: Models) -> None:
    seedless = adapt(sd15_unet(), seed=None)  # its layers start from torch's global state
    file = read_adapter(adapter_file_bytes({"unet": seedless}))
    unet = models.components["unet"]
    unet.conv_in.requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in unet.named_parameters()]
    rng = torch.get_rng_state()
    load_adapter(models.components, file)
    after = {
        name.replace(".base_layer", ""): p.requires_grad for name, p in unet.named_parameters()
    }
    assert [(name, after[name]) for name, _ in before] == before
    assert not any(flag for name, flag in after.items() if "snella_" in name)
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_second_adapter_becomes_the_only_active_one(
    adapter_file: AdapterFile, models: Models
) -> None:
    load_adapter(models.components, adapter_file, "a")
    other = read_adapter(adapter_file_bytes({"unet": adapt(sd15_unet(), seed=3)}))
    load_adapter(models.components, other, "b")
    for model in models.components.values():
        assert all(layer.active_adapters == ["b"] for _, layer in delta_layers(model))
    alone = adapt(sd15_unet(), seed=3)
    assert torch.equal(predict(models.components["unet"], "sd15"), predict(alone, "sd15"))


def test_it_goes_on_top_of_a_lora(
    adapter_file: AdapterFile, models: Models, expected: Tensor
) -> None:
    unet = models.components["unet"]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")  # B is 0: changes nothing
    load_adapter(models.components, adapter_file, "mine")
    # The base is called through the LoRA now, so the sum is a second product: equal to rounding.
    torch.testing.assert_close(predict(unet, "sd15"), expected, rtol=1e-4, atol=1e-5)
    assert set(unet.peft_config) == {"lora", "mine"}


def test_layers_whose_paths_end_alike_are_told_apart() -> None:
    """PEFT takes a name for every path it ends; a literal path is that path alone."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"to_q": nn.Linear(8, 8)})
        return nn.ModuleDict(
            {"block": inner, "outer": nn.ModuleDict({"block": copy.deepcopy(inner)})}
        )

    file = read_adapter(
        adapter_file_bytes({"m": adapt(model(), target_modules=["outer.block.to_q"])})
    )
    row = file.header.components["m"].model_copy(
        update={"layers": {"block.to_q": file.header.components["m"].layers["outer.block.to_q"]}}
    )
    header = file.header.model_copy(update={"components": {"m": row}})
    tensors = {name.replace("m.outer.", "m."): tensor for name, tensor in file.tensors.items()}
    target = model()
    load_adapter({"m": target}, AdapterFile(header, tensors, "x", None))
    assert [path for path, _ in delta_layers(target)] == ["block.to_q"]


Change = Callable[[dict[str, Any]], None]


def header_change(path: list[str], value: Any) -> Change:
    def apply(header: dict[str, Any]) -> None:
        node = header["components"]["text_encoder"]
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value

    return apply


def rename_layer(header: dict[str, Any]) -> None:
    layers = header["components"]["unet"]["layers"]
    layers[LAYER.replace("to_q", "to_x")] = layers.pop(LAYER)


def rename_tensors(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if LAYER in name]:
        tensors[name.replace("to_q", "to_x")] = tensors.pop(name)


def shrink_layer(header: dict[str, Any]) -> None:
    header["components"]["unet"]["layers"][LAYER] |= {"shape": [32, 16], "kept": 8}


def shrink_tensors(tensors: dict[str, Tensor]) -> None:
    tensors[f"unet.{LAYER}.snella_A"] = torch.zeros(2, 16, 2)


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(f"unet.{LAYER}.snella_{name}") and None


def put(name: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({f"unet.{LAYER}.snella_{name}": value})


def nothing(_: Any) -> None:
    pass


HUGE = torch.full((2, 32, 2), 1e30)
REFUSED: dict[str, tuple[Change, Change, type[SnellaError], str]] = {
    "unknown module": (
        rename_layer,
        rename_tensors,
        SnellaKeyError,
        r"layers of this UNet2DConditionModel, got 1 of 32 that are none: mid.*to_x; load the base",
    ),
    "other width": (
        shrink_layer,
        shrink_tensors,
        SnellaShapeError,
        r"to_q: expected \[out, in\] = \[32, 32\] as in this model, got \[32, 16\]",
    ),
    "missing tensor": (
        nothing,
        drop("gamma"),
        SnellaKeyError,
        "missing: snella_gamma, unknown: none",
    ),
    "extra tensor": (
        nothing,
        put("delta", torch.zeros(1)),
        SnellaKeyError,
        "missing: none, unknown: 'snella_delta'",
    ),
    "scalar shape": (
        nothing,
        put("alpha", torch.zeros(3)),
        SnellaShapeError,
        r"'snella_alpha': expected shape \[1\] .*got \[3\]",
    ),
    "signs shape": (
        nothing,
        put("signs", torch.zeros(5)),
        SnellaShapeError,
        r"expected shape \[2\]",
    ),
    "overflowing": (
        nothing,
        put("A", HUGE),
        SnellaValueError,
        "expected an update of finite torch.float32 numbers",
    ),
    "alpha huge": (
        nothing,
        put("alpha", torch.tensor([1e6])),
        SnellaValueError,
        "expected an update at most 100 times as large as the weight it is added to",
    ),
    "second component": (
        header_change(["config", "target_sparsity"], 7),
        nothing,
        SnellaConfigError,
        "'components.text_encoder.config': target_sparsity must be a number",
    ),
    "setting type": (
        header_change(["config", "dropout"], "no"),
        nothing,
        SnellaConfigError,
        "dropout",
    ),
    "setting unknown": (
        header_change(["config", "turbo"], 1),
        nothing,
        SnellaConfigError,
        "settings of method 'snella', got 'turbo' .known: alloc_beta1",
    ),
    "pattern": (
        header_change(["config", "target_modules"], "([a-z]+)+!"),
        nothing,
        SnellaConfigError,
        "got 'target_modules'",
    ),
    "modules to save": (
        header_change(["config", "modules_to_save"], ["(a+)+$"]),
        nothing,
        SnellaConfigError,
        "got 'modules_to_save'",
    ),
    "other class": (
        header_change(["base", "class"], "T5EncoderModel"),
        nothing,
        SnellaBaseError,
        "expected CLIPTextModel .* got 'T5EncoderModel', .*all its layers fit: load .*allow",
    ),
    "other settings": (
        header_change(["base", "config_hash"], "0" * 64),
        nothing,
        SnellaBaseError,
        "base.config_hash': expected .*got 000000000000.*a CLIPTextModel with other settings",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_adapter_leaves_no_trace(
    name: str, adapter_bytes: bytes, adapter_file: AdapterFile, models: Models
) -> None:
    header, tensors, error, message = REFUSED[name]
    adapt(models.components["unet"], "there", seed=7)
    before = fingerprint(models)
    file = read_adapter(rebuilt(adapter_bytes, header, tensors))
    with pytest.raises(error, match=message):
        load_adapter(models.components, file, "mine")
    assert fingerprint(models) == before
    load_adapter(models.components, adapter_file, "mine")


def test_a_component_that_is_not_there_is_named(adapter_file: AdapterFile) -> None:
    components = {"transformer": sd15_unet(), "text_encoder": text_encoder()}
    message = r"adapts 'unet' \(32 layers of a UNet2DConditionModel\), .*text_encoder, transformer"
    with pytest.raises(SnellaKeyError, match=message):
        load_adapter(components, adapter_file)


def test_another_base_is_told_by_its_first_difference(adapter_file: AdapterFile) -> None:
    narrow = sd15_unet(cross_attention_dim=16)
    components = {"unet": narrow, "text_encoder": text_encoder()}
    with pytest.raises(
        SnellaBaseError, match=r"other settings.*\[32, 16\] here, \[32, 32\] in the"
    ):
        load_adapter(components, adapter_file)
    with pytest.raises(SnellaShapeError, match="the adapter is for another model size"):
        load_adapter(components, adapter_file, allow_other_base=True)


def test_another_base_of_equal_shapes_can_be_forced(
    adapter_file: AdapterFile, expected: Tensor
) -> None:
    components = {"unet": sd15_unet(upcast_attention=True), "text_encoder": text_encoder()}
    with pytest.raises(
        SnellaBaseError, match=r"or pass allow_other_base=True .the file names 'tiny'"
    ):
        load_adapter(components, adapter_file)
    report = load_adapter(components, adapter_file, allow_other_base=True)
    assert report.base_matches == {"unet": False, "text_encoder": True}
    assert torch.equal(predict(components["unet"], "sd15"), expected)


def test_the_bound_on_the_update_can_be_moved(adapter_file: AdapterFile, models: Models) -> None:
    with pytest.raises(SnellaValueError, match=r"at most 0.01 times.*or raise max_relative_update"):
        load_adapter(models.components, adapter_file, max_relative_update=0.01)
    load_adapter(models.components, adapter_file, max_relative_update=1.0)


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a" * 65, "ä", "a b", None, 3])
def test_names_that_cannot_be_names(name: Any) -> None:
    with pytest.raises(SnellaValueError, match="expected 1 to 64 letters, digits, '_' or '-'"):
        check_adapter_name(name)


@pytest.mark.parametrize("name", ["keys", "pop", "training", "forward"])
def test_names_of_torch_attributes_are_refused(name: str) -> None:
    with pytest.raises(SnellaValueError, match=rf"choose another, e.g. 'my_{name}'"):
        check_adapter_name(name)


@pytest.mark.parametrize(
    "name", ["snella", "lora_A", "weight", "default_0", "unet", "attn1", "0-a"]
)
def test_odd_but_plain_names_work(
    name: str, adapter_file: AdapterFile, models: Models, expected: Tensor
) -> None:
    load_adapter(models.components, adapter_file, name)
    assert torch.equal(predict(models.components["unet"], "sd15"), expected)


@pytest.mark.parametrize("owner", ["snella", "lora"])
def test_a_taken_name_is_refused_before_anything_happens(
    owner: str, adapter_file: AdapterFile, models: Models
) -> None:
    encoder = models.components["text_encoder"]
    if owner == "snella":
        adapt(encoder, "mine")
    else:
        encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "mine")
    before = fingerprint(models)
    with pytest.raises(SnellaKeyError, match=r"'mine' is already in use on 'text_encoder'"):
        load_adapter(models.components, adapter_file, "mine")
    assert fingerprint(models) == before


def test_merged_layers_take_no_further_adapter(adapter_file: AdapterFile, models: Models) -> None:
    load_adapter(models.components, adapter_file, "a")
    layer = dict(delta_layers(models.components["unet"]))[LAYER]
    layer.merge()
    with pytest.raises(SnellaValueError, match=r"to_q has adapter.s. a merged into its weight"):
        load_adapter(models.components, adapter_file, "b")


def test_weights_that_are_not_in_memory_are_refused(
    adapter_file: AdapterFile, models: Models
) -> None:
    parent = models.components["unet"].get_submodule(LAYER.rpartition(".")[0])
    parent.to_q = nn.Linear(32, 32, bias=False, device="meta")
    with pytest.raises(SnellaValueError, match=r"no weights in memory .offloaded to meta."):
        load_adapter(models.components, adapter_file)


def test_fused_projections_take_no_adapter(adapter_file: AdapterFile, models: Models) -> None:
    models.components["unet"].fuse_qkv_projections()
    with pytest.raises(SnellaValueError, match=r"call unfuse_qkv_projections\(\) before loading"):
        load_adapter(models.components, adapter_file)


def test_a_failure_in_the_second_phase_is_taken_back(
    adapter_file: AdapterFile, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_adapter(models.components, adapter_file, "there")
    before = fingerprint(models)
    original, calls = load_module.fill, 0

    def fail_on_the_model(layer: DeltaLayer, name: str, tensors: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("no memory left")
        original(layer, name, tensors)

    monkeypatch.setattr(load_module, "fill", fail_on_the_model)
    with pytest.raises(RuntimeError, match="no memory left"):
        load_adapter(models.components, adapter_file, "mine")
    assert fingerprint(models) == before


def test_no_code_is_imported_and_no_file_opened_while_loading(
    adapter_path: Path, models: Models
) -> None:
    import sys

    file = read_adapter(adapter_path)
    load_adapter(models.components, file, "warm")
    seen: list[str] = []
    on = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if on and event in ("open", "import", "exec", "os.system", "subprocess.Popen"):
            seen.append(f"{event} {arguments[0]}")

    sys.addaudithook(audit)
    load_adapter(models.components, read_adapter(adapter_path), "audited")
    on = False
    others = [event for event in seen if str(adapter_path) not in event]
    assert len(others) < len(seen)
    # "open 12" wraps a descriptor that is open already.
    assert [event for event in others if not event.split()[-1].isdigit()] == []
