"""Offloading before and after an adapter, and every verb while it is on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from accelerate.hooks import AlignDevicesHook
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from snell_diffusion import SnellaAttnProcessor
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners import delta_layers
from snell_diffusion.tuners.offload import group_hook
from tests.registry.made import Made
from tests.registry.record import predict

FAMILIES = ["unet_sd15", "flux", "pixart", "lumina_next"]


def blocks(model: nn.Module) -> None:
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def leaves(model: nn.Module) -> None:
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "sequential": lambda model: cpu_offload(model, torch.device("cpu")),
    "model": lambda model: cpu_offload_with_hook(model, torch.device("cpu")),
    "group, blocks": blocks,
    "group, leaves": leaves,
}


def on(way: str, model: nn.Module) -> bool:
    """Whether a way of offloading is on, for the adapter's tensors too."""
    if way == "model":
        return hasattr(model, "_hf_hook")
    if way == "sequential":
        return all(parameter.device.type == "meta" for parameter in model.parameters())
    grouped = {id(tensor) for module in model.modules() for tensor in group_tensors(module)}
    return all(id(parameter) in grouped for parameter in model.parameters())


def group_tensors(module: nn.Module) -> list[Tensor]:
    hook = group_hook(module)
    if hook is None:
        return []
    inside = [tensor for part in hook.group.modules for tensor in part.parameters()]
    return [*inside, *hook.group.parameters]


def close(left: Tensor, right: Tensor) -> bool:
    """To rounding: a hooked layer is called as it is, and its update is a second product."""
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_load_before_and_after(name: str, way: str, made_for: Callable[[str], Made]) -> None:
    made = made_for(name)
    family = made.family
    expected = made.merged({"a": 1.0})
    for first in (True, False):
        pipe = family.pipe()
        model = getattr(pipe, family.component)
        if first:
            pipe.load_snella_weights(made.files["a"])
        WAYS[way](model)
        if not first:
            assert torch.equal(predict(family, model), made.base)
            pipe.load_snella_weights(made.files["a"])
        assert on(way, model)
        for _ in range(2):
            assert close(predict(family, model), expected)
        assert on(way, model)


@pytest.mark.parametrize("way", WAYS)
def test_every_verb_while_it_is_on(way: str, made_for: Callable[[str], Made]) -> None:
    made = made_for("flux")
    family = made.family
    pipe = family.pipe()
    model = pipe.transformer
    WAYS[way](model)
    full, half = made.merged({"a": 1.0}), made.merged({"a": 0.5})

    def shows(expected: Tensor) -> bool:
        return on(way, model) and close(predict(family, model), expected)

    pipe.load_snella_weights(made.files["a"], "a")
    pipe.load_snella_weights(made.files["b"], "b")
    assert shows(made.merged({"b": 1.0}))
    pipe.set_snella_adapters("a", 0.5)
    assert shows(half)
    pipe.set_snella_adapters("a")
    pipe.set_snella_sparsity(1.0, "a")
    assert shows(made.base)
    pipe.set_snella_sparsity(None)
    pipe.fuse_snella()
    assert shows(full)
    pipe.unfuse_snella()
    assert shows(full)
    again = family.pipe()
    again.load_snella_weights(pipe.snella_state_dict("a"))
    assert torch.equal(predict(family, again.transformer), full)
    pipe.delete_snella_adapters("b")
    SnellaAttnProcessor.install(model)
    assert close(predict(family, model), full)
    pipe.set_snella_adapters("a", 0.5)
    assert close(predict(family, model), half)
    pipe.unload_snella_weights()
    assert on(way, model)
    assert torch.equal(predict(family, model), made.base)


def test_a_refused_load_puts_the_offloading_back(made_for: Callable[[str], Made]) -> None:
    made = made_for("flux")
    pipe = made.family.pipe()
    WAYS["sequential"](pipe.transformer)
    with pytest.raises(SnellaValueError, match="adapter_name: expected 1 to 64"):
        pipe.load_snella_weights(made.files["a"], "a.b")
    assert on("sequential", pipe.transformer)
    assert torch.equal(predict(made.family, pipe.transformer), made.base)


def test_no_update_stays_behind_on_the_device(made_for: Callable[[str], Made]) -> None:
    made = made_for("flux")
    pipe = made.family.pipe()
    pipe.load_snella_weights(made.files["a"])
    predict(made.family, pipe.transformer)
    assert all(layer._kept is not None for _, layer in delta_layers(pipe.transformer))
    WAYS["sequential"](pipe.transformer)
    predict(made.family, pipe.transformer)
    assert all(layer._kept is None for _, layer in delta_layers(pipe.transformer))


def test_weights_on_the_disk_are_left_there(
    made_for: Callable[[str], Made], tmp_path: Path
) -> None:
    made = made_for("flux")
    pipe = made.family.pipe()
    disk_offload(pipe.transformer, str(tmp_path / "accelerate"), torch.device("cpu"))
    with pytest.raises(SnellaValueError, match=r"no weights in memory .*load the adapter before"):
        pipe.load_snella_weights(made.files["a"])
    assert isinstance(pipe.transformer.proj_out._hf_hook, AlignDevicesHook)
    assert torch.equal(predict(made.family, pipe.transformer), made.base)


def test_groups_on_the_disk_are_refused(made_for: Callable[[str], Made], tmp_path: Path) -> None:
    made = made_for("flux")
    pipe = made.family.pipe()
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    with pytest.raises(SnellaValueError, match=r"FluxTransformer2DModel is group-offloaded to the"):
        pipe.load_snella_weights(made.files["a"])
    assert close(predict(made.family, pipe.transformer), made.base)


def test_an_adapter_is_offloaded_to_the_disk_with_its_model(
    made_for: Callable[[str], Made], tmp_path: Path
) -> None:
    """Between calls its tensors hold nothing, so the hooks must be what brings them back."""
    made = made_for("flux")
    pipe = made.family.pipe()
    pipe.load_snella_weights(made.files["a"])
    expected = made.merged({"a": 1.0})
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    with torch.no_grad():
        for _, layer in delta_layers(pipe.transformer):
            layer.snella_A["default_0"].fill_(torch.nan)
    assert close(predict(made.family, pipe.transformer), expected)
