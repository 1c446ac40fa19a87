"""Which updates a load evaluates, and what its report measures."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from snell_diffusion.adapters import AdapterFile, load_adapter, proportion
from snell_diffusion.adapters.attach import remove_adapter
from snell_diffusion.errors import SnellaKeyError, SnellaValueError
from snell_diffusion.tuners import DeltaLayer, delta_layers
from tests.tiny_models import predict, sd15_unet, text_encoder

Components = dict[str, nn.Module]
Watched = Callable[[], list[str]]


@pytest.fixture
def components() -> Components:
    return {"unet": sd15_unet(), "text_encoder": text_encoder()}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each evaluation of an update came to."""
    found: list[float] = []
    original = proportion.measured_update

    def watched(*args: Any) -> float:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(proportion, "measured_update", watched)
    return found


def test_ordinary_updates_are_not_evaluated(
    adapter_file: AdapterFile, components: Components, measured: list[float]
) -> None:
    load_adapter(components, adapter_file)
    assert measured == []


def test_updates_near_the_bound_are_measured(
    adapter_file: AdapterFile, components: Components, measured: list[float]
) -> None:
    report = load_adapter(components, adapter_file, max_relative_update=1.0)
    assert len(measured) > 0
    assert max(measured) == pytest.approx(report.largest_update)


def test_a_method_without_a_bound_is_measured(
    adapter_file: AdapterFile,
    components: Components,
    measured: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = type(next(delta_layers(adapted_once(adapter_file)))[1])
    monkeypatch.setattr(kind, "norm_bound", DeltaLayer.norm_bound)
    load_adapter(components, adapter_file)
    assert len(measured) == 44


def adapted_once(file: AdapterFile) -> nn.Module:
    components = {"unet": sd15_unet(), "text_encoder": text_encoder()}
    load_adapter(components, file)
    return components["unet"]


@pytest.mark.parametrize("sparse", [False, True])
def test_the_bound_holds_for_weights_of_any_distribution(
    adapter_file: AdapterFile, components: Components, sparse: bool
) -> None:
    """Rows of zeros hide nothing: what is looked at is a lower bound of the whole norm."""
    for module in components["unet"].modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight[:: proportion.ROWS] *= 0.0 if sparse else 100.0
    others = copy.deepcopy(components)
    bound = 0.9 * load_adapter(others, adapter_file).largest_update
    with pytest.raises(SnellaValueError, match="expected an update at most"):
        load_adapter(components, adapter_file, max_relative_update=bound)


def test_the_report_measures_what_is_still_there(
    adapter_file: AdapterFile, components: Components
) -> None:
    report = load_adapter(components, adapter_file, "mine")
    for model in components.values():
        remove_adapter(model, "mine")
    with pytest.raises(SnellaKeyError, match="'mine' has been unloaded"):
        report.largest_update  # noqa: B018


def test_a_report_keeps_nothing_alive(adapter_file: AdapterFile, components: Components) -> None:
    report = load_adapter(components, adapter_file, "mine")
    for model in components.values():
        remove_adapter(model, "mine")
    gc.collect()
    assert all(reference() is None for reference in report._live)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(
    enabled: bool, adapter_file: AdapterFile, components: Components
) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        load_adapter(components, adapter_file)
        assert gc.isenabled() is enabled
        with pytest.raises(SnellaKeyError):
            load_adapter(components, adapter_file)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_a_second_adapter_takes_as_many_steps_as_the_first(
    adapter_file: AdapterFile, components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT compares the path of every module with that of every adapted one."""
    calls: list[str] = []
    original = nn.Module.get_submodule

    def counted(module: nn.Module, path: str) -> nn.Module:
        calls.append(path)
        return original(module, path)

    monkeypatch.setattr(nn.Module, "get_submodule", counted)
    load_adapter(components, adapter_file, "first")
    first = len(calls)
    load_adapter(components, adapter_file, "second")
    assert len(calls) == 2 * first
    one = predict(components["unet"], "sd15")
    remove_adapter(components["unet"], "first")
    assert torch.equal(predict(components["unet"], "sd15"), one)
