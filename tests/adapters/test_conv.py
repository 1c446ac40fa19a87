"""Convolutions in adapter files: exact after loading, fusing and exporting, and hostile rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
from snell_diffusion.adapters import adapter_file_bytes, adapter_names, load_adapter, read_adapter
from snell_diffusion.adapters.export_lora import export_lora, factorize
from snell_diffusion.adapters.export_merge import merge_adapter
from snell_diffusion.errors import (
    SnellaError,
    SnellaSchemaError,
    SnellaShapeError,
    SnellaValueError,
)
from snell_diffusion.tuners import delta_layers
from tests.adapters.files import rebuilt
from tests.tiny_models import adapt, fingerprint, pipeline, predict, sd15_unet

TARGETS = ["to_q", "conv1", "conv_shortcut", "conv", "proj_in"]
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def made() -> tuple[bytes, Tensor]:
    """An adapter on Linears and convolutions as a file, and what it predicts."""
    unet = adapt(sd15_unet(), target_modules=TARGETS)
    assert {layer.kind for _, layer in delta_layers(unet)} == {"linear", "conv2d"}
    return adapter_file_bytes({"unet": unet}), predict(unet, "sd15")


def test_it_predicts_the_same_after_loading_fusing_and_unfusing(made: Any, tmp_path: Path) -> None:
    data, expected = made
    (tmp_path / "a.safetensors").write_bytes(data)
    pipe = pipeline()
    stock, before = predict(pipe.unet, "sd15"), fingerprint(pipe)
    pipe.load_snella_weights(tmp_path / "a.safetensors")
    assert torch.equal(predict(pipe.unet, "sd15"), expected)
    pipe.fuse_snella()
    torch.testing.assert_close(predict(pipe.unet, "sd15"), expected)
    pipe.unfuse_snella()
    assert torch.equal(predict(pipe.unet, "sd15"), expected)
    pipe.set_snella_sparsity(1.0)
    torch.testing.assert_close(predict(pipe.unet, "sd15"), stock)
    pipe.set_snella_sparsity(None)
    pipe.set_snella_adapters("default_0", 0.5)
    assert not torch.allclose(predict(pipe.unet, "sd15"), expected, atol=1e-6)
    pipe.unload_snella_weights()
    assert {**fingerprint(pipe), "rng": 0} == {**before, "rng": 0}


def test_the_file_tells_the_kernel_and_needs_a_later_reader(made: Any) -> None:
    file = read_adapter(made[0])
    row = file.header.components["unet"].layers[CONV]
    assert (row.kind, row.shape, row.kernel, row.groups) == ("conv2d", [16, 144], [3, 3], 1)
    assert (file.header.format, file.header.requires) == ("1.1", ["conv", "snella"])
    assert file.tensors[f"unet.{CONV}.snella_kernel"].tolist() == [3, 3, 1]


def test_bare_tensors_still_load(made: Any) -> None:
    unet = sd15_unet()
    load_adapter({"unet": unet}, read_adapter(load(made[0])))
    assert torch.equal(predict(unet, "sd15"), made[1])


def test_merged_for_good(made: Any) -> None:
    unet = sd15_unet()
    rows = merge_adapter({"unet": unet}, read_adapter(made[0]))
    assert max(row.relative for row in rows) < 1e-3
    assert not adapter_names({"unet": unet})
    torch.testing.assert_close(predict(unet, "sd15"), made[1])


@pytest.mark.parametrize("style", ["lora", "kohya"])
def test_stock_diffusers_loads_the_lora(style: str, made: Any, tmp_path: Path) -> None:
    path = tmp_path / "conv.safetensors"
    report = export_lora(read_adapter(made[0]), path, rank=None, style=style)
    assert report.relative < 1e-5
    down = load(path.read_bytes())
    [name] = [
        n
        for n in down
        if CONV.replace(".", "_") in n.replace(".", "_")
        and down[n].ndim == 4
        and down[n].shape[-1] == 3
    ]
    assert down[name].shape[1:] == (16, 3, 3)
    pipe = pipeline()
    pipe.load_lora_weights(path)
    torch.testing.assert_close(predict(pipe.unet, "sd15"), made[1], rtol=1e-4, atol=1e-5)


def test_a_lower_rank_is_the_nearest(made: Any, tmp_path: Path) -> None:
    file = read_adapter(made[0])
    report = export_lora(file, tmp_path / "conv.safetensors", rank=2)
    row = next(row for row in report.layers if row.layer == f"unet.{CONV}")
    assert row.shape == (16, 144)
    assert 0 < row.relative < 1
    assert factorize(torch.eye(3), 2)[2] == pytest.approx(2 / 3)


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(6, 3))


def test_groups_are_saved_and_refused_as_lora(tmp_path: Path) -> None:
    model = adapt(grouped(), target_modules=["0", "1"])
    data = adapter_file_bytes({"unet": model})
    other, x = grouped(), torch.randn(1, 4, 8, 8)
    load_adapter({"unet": other}, read_adapter(data))
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))
    with pytest.raises(SnellaValueError, match="2 groups has no LoRA of this form"):
        export_lora(read_adapter(data), tmp_path / "x.safetensors")


def at(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["components"]["unet"]["layers"][CONV].update(values)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], type[SnellaError], str]] = {
    "no kernel": (at(kernel=None), SnellaSchemaError, "expected kernel and groups of a conv2d"),
    "a linear's kernel": (at(kind="linear"), SnellaSchemaError, "and of nothing else"),
    "an unknown kind": (at(kind="conv3d"), SnellaSchemaError, "kind"),
    "a kernel of zero": (at(kernel=[0, 3]), SnellaSchemaError, "sizes from 1 to 64"),
    "a huge kernel": (at(kernel=[65, 3]), SnellaSchemaError, "sizes from 1 to 64"),
    "three sizes": (at(kernel=[3, 3, 3]), SnellaSchemaError, "at most 2 entries"),
    "no divisor": (at(kernel=[5, 3]), SnellaSchemaError, "whose product divides the inputs"),
    "groups of zero": (at(groups=0), SnellaSchemaError, "expected 1 or more"),
    "odd groups": (at(groups=3), SnellaSchemaError, "groups that divide the outputs"),
    "another kernel": (at(kernel=[1, 9]), SnellaValueError, r"_kernel': expected \[1.0, 9.0, 1.0"),
    "not required": (
        lambda header: header.update(requires=["snella"]),
        SnellaSchemaError,
        "expected 'conv', which the file uses",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_row_is_refused(case: str, made: Any) -> None:
    change, error, message = HOSTILE[case]
    with pytest.raises(error, match=message):
        read_adapter(rebuilt(made[0], change, version="1.1"))


def test_a_kernel_of_another_form_is_told(made: Any) -> None:
    def change(header: dict[str, Any]) -> None:
        at(kernel=[9, 1])(header)

    def tensors(found: dict[str, Tensor]) -> None:
        found[f"unet.{CONV}.snella_kernel"] = torch.tensor([9.0, 1.0, 1.0])

    file = read_adapter(rebuilt(made[0], change, tensors, version="1.1"))
    expected = r"expected \[out, in\] = \[16, 144\] of a 3x3 kernel .* got \[16, 144\] of a 9x1"
    with pytest.raises(SnellaShapeError, match=expected):
        load_adapter({"unet": sd15_unet()}, file)
