"""Bases in 8 and 4 bits: what is refused where, and a whole run where torchao is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
from snell_diffusion.diffusion import quantization
from snell_diffusion.diffusion.quantization import entries, loading_options, plain_values
from snell_diffusion.diffusion.setup import build_model
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from tests import tiny_models
from tests.diffusion.training_runs import config

KINDS = ("bnb_nf4", "bnb_int8", "torchao_int8", "torchao_fp8")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install torchao"
)


def test_none_asks_for_nothing() -> None:
    assert loading_options("none", "unet", torch.float32) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_with_its_extra(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    package = "bitsandbytes" if kind.startswith("bnb") else "torchao"
    expected = rf"{kind} needs {package}, .* pip install 'snell-diffusion\[quant\]'"
    with pytest.raises(SnellaConfigError, match=expected):
        loading_options(kind, "unet", torch.float32)


def test_bitsandbytes_bases_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SnellaConfigError, match=r"bnb_nf4 needs a GPU, .* use torchao_int8"):
        loading_options("bnb_nf4", "unet", torch.float32)


def test_it_is_refused_before_anything_loads(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    with pytest.raises(SnellaConfigError, match="needs torchao"):
        build_model(
            config(tiny_base, tmp_path, base_quantization="torchao_int8"), torch.device("cpu")
        )


def test_packed_weights_count_all_their_numbers() -> None:
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert entries(linear) == 24
    assert entries(nn.Conv2d(2, 3, 3)) == 54


def test_plain_weights_are_read_as_they_are() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert torch.equal(plain_values(weight), torch.arange(6.0))


@needs_torchao
@pytest.mark.parametrize("kind", ["torchao_int8", "torchao_fp8"])
def test_training_resumes_exactly_and_loads_into_the_plain_base(
    tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    options: dict[str, Any] = {"base_quantization": kind, "checkpointing_steps": 2}
    whole = run(config(tiny_base, tmp_path / "a", **options))
    checkpoint = whole.output_dir / "checkpoints" / "step-000004"
    assert checkpoint.is_dir()
    half = config(tiny_base, tmp_path / "b", **options, max_train_steps=4)
    first = run(config(tiny_base, tmp_path / "c", **options, checkpoints_total_limit=3)).output_dir
    again = run(
        config(
            tiny_base,
            tmp_path / "b",
            **options,
            resume_from_checkpoint=str(first / "checkpoints" / "step-000002"),
        )
    )
    assert half.max_train_steps == 4
    assert again.adapter_path is not None
    assert whole.adapter_path is not None
    assert again.adapter_path.read_bytes() == whole.adapter_path.read_bytes()

    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    before = tiny_models.picture(pipe)
    pipe.load_snella_weights(whole.adapter_path)
    assert not torch.equal(tiny_models.picture(pipe), before)


@needs_torchao
def test_a_quantized_base_is_not_merged_into(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, base_quantization="torchao_int8")
    model = build_model(settings, torch.device("cpu"))
    layer = next(m for m in model.denoiser.modules() if hasattr(m, "merge"))
    with pytest.raises(ValueError, match="load the base model unquantized"):
        layer.merge()
    plain = build_model(config(tiny_base, tmp_path), torch.device("cpu"))
    assert model.base != plain.base
    assert model.sizes == plain.sizes
