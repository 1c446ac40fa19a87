"""Switching adapters on a pipeline: the base stays, little is computed, nothing is left behind."""

import copy
import gc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import snell_diffusion  # noqa: F401
from snell_diffusion import SnellaAttnProcessor
from snell_diffusion.diffusion.memory.live import LiveBytes
from snell_diffusion.tuners import delta_layers, effective
from tests.tiny_models import adapt, picture, pipeline, predict

Weights = dict[str, tuple[int, int, int]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, name in enumerate(("a", "b"), start=1):
        pipe = pipeline()
        adapt(pipe.unet, name, seed=seed)
        made[name] = pipe.save_snella_weights(folder / f"{name}.safetensors", name)
    return made


def loaded(files: dict[str, Path]) -> Any:
    pipe = pipeline()
    for name, path in files.items():
        pipe.load_snella_weights(path, name)
    return pipe


def base_weights(pipe: Any) -> Weights:
    """Identity, place and version of every weight of the base."""
    named = pipe.unet.named_parameters()
    return {
        name.replace(".base_layer", ""): (id(weight), weight.data_ptr(), weight._version)
        for name, weight in named
        if "snella_" not in name
    }


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each layer's weight was computed."""
    calls: Counter[int] = Counter()
    original = effective.effective_weight

    def counted(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[id(layer)] += 1
        return original(layer, *args, **kwargs)

    monkeypatch.setattr("snell_diffusion.tuners.layer.effective_weight", counted)
    return calls


def test_switching_touches_no_base_weight_and_computes_once_a_switch(
    files: dict[str, Path], computed: Counter[int]
) -> None:
    before = pipeline()
    pipe = loaded(files)
    weights = base_weights(pipe)
    assert weights.keys() == base_weights(before).keys()
    expected: dict[str, Tensor] = {}
    for turn in range(1, 7):
        name = "ab"[turn % 2]
        pipe.set_snella_adapters(name)
        shown = picture(pipe)
        assert torch.equal(shown, expected.setdefault(name, shown))
        assert torch.equal(picture(pipe), shown)
        assert set(computed.values()) == {turn}
        assert base_weights(pipe) == weights
    assert len(computed) == 32
    assert not torch.equal(expected["a"], expected["b"])


def test_a_strength_that_stays_costs_nothing(
    files: dict[str, Path], computed: Counter[int]
) -> None:
    pipe = loaded(files)
    pipe.set_snella_adapters(["a", "b"], [0.5, 0.25])
    shown = picture(pipe)
    pipe.set_snella_adapters(["a", "b"], [0.5, 0.25])
    pipe.disable_snella()
    picture(pipe)
    pipe.enable_snella()
    assert torch.equal(picture(pipe), shown)
    assert set(computed.values()) == {1}


def test_the_cache_is_released_on_demand(files: dict[str, Path]) -> None:
    pipe = loaded(files)
    shown = picture(pipe)
    for install in (False, True):
        if install:
            SnellaAttnProcessor.install(pipe.unet)
            assert torch.equal(picture(pipe), shown)
        layers = all_layers(pipe)
        assert all(layer._kept is not None for layer in layers)
        pipe.release_snella_cache()
        assert all(layer._kept is None for layer in layers)
    assert torch.equal(picture(pipe), shown)
    pipeline().release_snella_cache()


def all_layers(pipe: Any) -> list[Any]:
    """Layers in the model and those that attention processors hold."""
    held = [
        delta
        for module in pipe.unet.modules()
        for hook in module._forward_pre_hooks.values()
        for delta in getattr(hook, "deltas", {}).values()
    ]
    return [*(layer for _, layer in delta_layers(pipe.unet)), *held]


@pytest.mark.parametrize("install", [False, True])
def test_moving_a_model_releases_what_was_kept_on_the_device(
    files: dict[str, Path], install: bool
) -> None:
    """As model offloading does after each picture."""
    pipe = loaded(files)
    if install:
        SnellaAttnProcessor.install(pipe.unet)
    picture(pipe)
    layers = all_layers(pipe)
    assert len(layers) == 32
    assert all(layer._kept is not None for layer in layers)
    pipe.unet.to("meta" if not install else torch.float64)
    assert all(layer._kept is None for layer in layers)


def test_processors_leave_nothing_on_the_base(files: dict[str, Path]) -> None:
    pipe = loaded(files)
    SnellaAttnProcessor.install(pipe.unet)
    shown = picture(pipe)
    twin = copy.deepcopy(pipe.unet)
    twin.to(torch.float64)
    assert all(layer._kept is not None for layer in all_layers(pipe))
    assert torch.equal(picture(pipe), shown)
    SnellaAttnProcessor.remove(pipe.unet)
    assert not any("_apply" in vars(module) for module in pipe.unet.modules())
    pipe.unload_snella_weights()
    assert not any("_apply" in vars(module) for module in pipe.unet.modules())


def test_fusing_a_lora_that_wraps_our_layers_is_seen(files: dict[str, Path]) -> None:
    """PEFT writes into the base through `weight.data`, which no version counts."""
    pipe = loaded(files)
    with warnings.catch_warnings(action="ignore"):
        lora = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
        pipe.unet.add_adapter(lora, "lora")
    for module in pipe.unet.modules():
        if hasattr(module, "base_layer"):
            module.set_adapter(["b", "lora"], inference_mode=True)
    apart = predict(pipe.unet, "sd15")
    pipe.unet.fuse_lora(adapter_names=["lora"])
    torch.testing.assert_close(predict(pipe.unet, "sd15"), apart, rtol=1e-4, atol=1e-5)


# What is left behind


def state_of(pipe: Any) -> dict[str, Any]:
    modules = list(pipe.unet.named_modules())
    return {
        "modules": [(path, id(module), type(module)) for path, module in modules],
        "own": [(path, sorted(vars(module))) for path, module in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for _, m in modules],
        "processors": [type(getattr(module, "processor", None)) for _, module in modules],
    }


def live_bytes() -> tuple[int, int]:
    """Tensors that exist and the bytes they show."""
    gc.collect()
    # Asking some lazy modules for their class warns.
    with warnings.catch_warnings(action="ignore"):
        tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


def round_trip(pipe: Any, files: dict[str, Path], turn: int) -> None:
    """Everything a session does with adapters."""
    pipe.load_snella_weights(files["a"], "a")
    pipe.load_snella_weights(files["b"], "b")
    predict(pipe.unet, "sd15")
    pipe.set_snella_adapters(["a", "b"], [1.0, 0.5])
    predict(pipe.unet, "sd15")
    pipe.fuse_snella()
    pipe.unfuse_snella()
    pipe.set_snella_sparsity(0.8)
    if turn % 5 == 0:
        SnellaAttnProcessor.install(pipe.unet)
        predict(pipe.unet, "sd15")
    pipe.delete_snella_adapters("a")
    pipe.unload_snella_weights()


def test_50_loads_and_unloads_leave_nothing_behind(files: dict[str, Path]) -> None:
    pipe = pipeline()
    before = state_of(pipe)
    expected = predict(pipe.unet, "sd15")
    weights = base_weights(pipe)
    found, resident = [], []
    for turn in range(25):
        round_trip(pipe, files, turn)
        if turn % 5 == 4:
            found.append(live_bytes())
            resident.append(psutil.Process().memory_info().rss)
    assert found[1:] == found[:1] * 4
    assert resident[-1] - resident[1] < 4 * 2**20
    assert state_of(pipe) == before
    assert torch.equal(predict(pipe.unet, "sd15"), expected)
    kept = {name: place[:2] for name, place in base_weights(pipe).items()}
    assert kept == {name: place[:2] for name, place in weights.items()}


def test_loading_makes_no_copy_of_the_base(files: dict[str, Path]) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(files["a"], "a")
    pipe.unload_snella_weights()
    adapter = files["b"].stat().st_size
    base = sum(weight.nbytes for weight in pipe.unet.parameters())
    with LiveBytes() as counted:
        counted.add(pipe.unet.parameters())
        counted.reset()
        pipe.load_snella_weights(files["b"], "b")
    assert counted.peak < base + 3 * adapter < 1.5 * base
    assert counted.live < base + adapter
