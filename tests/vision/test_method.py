"""Where methods fit and where they do not: refused in words, or adapted and finite."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.vision.loading import load_base
from snell_diffusion.vision.method import LINEAR_PROBE, adapt, method_names
from snell_diffusion.vision.run import run
from tests.vision import runs

NO_PLACE = {
    ("convnext", "binary_lora"): "binary_lora adapts attention's q and v projections; "
    "ConvNextForImageClassification has none by a usual name; name others with target_modules",
    ("convnext", "hta"): "hta adapts attention's q, k, v and output projections; "
    "ConvNextForImageClassification has none by a usual name; name others with target_modules",
    ("convnext", "oft"): "method oft cannot adapt vit.convnext.encoder.stages.0.layers.0.pwconv1: "
    "it takes every input of four axes for a convolution's [B, C, H, W], and Linear layers of "
    "ConvNeXt read [B, H, W, C]; use another method, such as hra or lora",
}
"""Refusals by base and method."""


def scores(base: str, **changes: Any) -> torch.Tensor:
    """Class scores [2, 3] of noise from a base that was just adapted for 20 steps."""
    loaded = load_base(base, 3)
    adapt(runs.config(base, Path("x"), None, **changes), loaded, 20, lambda settings: settings)
    pixels = torch.rand(2, 3, runs.SIDE, runs.SIDE, generator=torch.Generator().manual_seed(0))
    return loaded.family.logits(loaded.model, pixels)


# PEFT's SHiRA builds sparse tensors, of which torch warns once.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("method", sorted(method_names()))
@pytest.mark.parametrize("base", ["swin", "convnext"])
def test_every_method_fits_or_says_why_not(base: str, method: str, bases: dict[str, str]) -> None:
    """No method gets as far as a training that cannot run."""
    changes = {"method": method, **runs.SMALL.get(method, {})}
    refusal = NO_PLACE.get((base, method))
    if refusal is None:
        assert scores(bases[base], **changes).isfinite().all()
        return
    with pytest.raises(SnellaConfigError, match=f"^{re.escape(refusal)}$"):
        scores(bases[base], **changes)


@pytest.mark.parametrize(
    "method, place",
    [("hta", "pwconv2"), ("binary_lora", "pwconv1"), ("oft", "patch_embeddings")],
)
def test_named_layers_are_adapted(method: str, place: str, bases: dict[str, str]) -> None:
    """What a method does not look for by itself it takes; OFT takes convolutions."""
    changes = {"target_modules": [place], **runs.SMALL.get(method, {})}
    assert scores(bases["convnext"], method=method, **changes).isfinite().all()


@pytest.mark.parametrize(
    "base, changes, message",
    [
        ("convnext", {"method": "hta"}, "hta adapts attention's q, k, v and output projections"),
        ("convnext", {"method": "oft", "rank": 4}, "method oft cannot adapt"),
        ("vit", {"method": "adalora", "max_train_steps": 1}, "it takes 2 optimizer steps or more"),
    ],
)
def test_refused_before_anything_is_written(
    base: str,
    changes: dict[str, Any],
    message: str,
    bases: dict[str, str],
    pictures: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SnellaConfigError, match=message):
        run(runs.config(bases[base], pictures, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_refusals_name_methods_there_are() -> None:
    assert {method for _, method in NO_PLACE} <= {*method_names()} - {LINEAR_PROBE}
