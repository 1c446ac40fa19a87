"""Loading a base for training: what is refused, in which precision parts are kept, what is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from snell_diffusion.diffusion import setup
from snell_diffusion.diffusion.families import families
from snell_diffusion.diffusion.setup import (
    absent_parts,
    base_digest,
    build_model,
    load_base,
    size_notes,
)
from snell_diffusion.errors import SnellaConfigError
from tests.diffusion.training_runs import config
from tests.families import tiny_sd3


@pytest.fixture(scope="module")
def sd3_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "base"
    tiny_sd3.save_with_t5(folder)
    return folder


def test_a_side_that_does_not_fit_is_refused_before_weights_load(
    sd3_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Untouched:
        name, multiple = "sd3", 16

        def load(self, *arguments: Any, **options: Any) -> None:
            pytest.fail("the base was loaded")

    monkeypatch.setattr(setup, "family_of", lambda *arguments: Untouched())
    with pytest.raises(
        SnellaConfigError,
        match=r"resolution is 40, but a base of the family sd3 takes multiples of 16 .* 32 or 48",
    ):
        load_base(config(sd3_base, tmp_path, resolution=40))


@pytest.mark.parametrize(
    "precision, denoiser, large",
    [
        ("no", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.bfloat16),  # T5 overflows in float16
    ],
)
def test_precision_of_each_part(
    sd3_base: Path, tmp_path: Path, precision: str, denoiser: torch.dtype, large: torch.dtype
) -> None:
    _, pipe = load_base(config(sd3_base, tmp_path, mixed_precision=precision))
    assert pipe.transformer.dtype == denoiser
    assert {p.dtype for p in pipe.text_encoder_3.parameters()} == {large}
    assert {part.dtype for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {
        torch.float32
    }


@pytest.mark.parametrize("side, told", [(16, True), (32, False), (48, False), (64, True)])
def test_a_resolution_far_from_the_bases_own_is_told(
    tiny_base: Path, tmp_path: Path, side: int, told: bool
) -> None:
    """The tiny base was made for 32 pixels."""
    settings = config(tiny_base, tmp_path, resolution=side)
    notes = size_notes(settings, build_model(settings, torch.device("cpu")))
    expected = f"resolution is {side} pixels, but the base was made for 32: expect poor pictures"
    assert [note.startswith(expected) for note in notes] == [True] * told


def test_parts_that_a_base_lacks_are_named() -> None:
    assert absent_parts(tiny_sd3.pipeline(t5=False)) == ("text_encoder_3", "tokenizer_3")
    assert absent_parts(tiny_sd3.pipeline(t5=True)) == ()


def test_the_digest_covers_the_encoders_that_are_not_adapted() -> None:
    family, pipe = families()["sd3"], tiny_sd3.pipeline(t5=True)
    before = base_digest(family, pipe)
    with torch.no_grad():
        pipe.text_encoder_3.shared.weight[0, 0] += 1
    assert base_digest(family, pipe) != before
    assert base_digest(family, tiny_sd3.pipeline(t5=False)) != before
