"""The embedded base: both adapter forms draw the same bits, and it goes in and out cleanly."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from snell_diffusion import SnellaAttnProcessor
from snell_diffusion.adapters import save_adapter
from snell_diffusion.models import embedded_path
from tests.tiny_models import adapt

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def embedded() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return embedded()


def draw(pipe: StableDiffusionPipeline) -> Tensor:
    """Pixels of a three-step sample, (1, 64, 64, 3)."""
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        "a photo of a sks cat in the snow",
        num_inference_steps=3,
        generator=generator,
        output_type="np",
    ).images
    return torch.from_numpy(images)


@pytest.mark.parametrize("rule", ["squared", "mask"])
def test_tuner_layers_and_processors_draw_the_same_bits(
    rule: str, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    base = draw(pipe)
    made = embedded()
    adapt(made.unet, target_modules=TARGETS, r=8, sparsify=rule)
    save_adapter(tmp_path, {"unet": made.unet}, base={"source": "embedded"})
    expected = draw(made)

    report = pipe.load_snella_weights(tmp_path)
    assert report.base_matches == {"unet": True}
    assert not torch.equal(expected, base)
    assert torch.equal(draw(pipe), expected)
    SnellaAttnProcessor.install(pipe.unet)
    assert torch.equal(draw(pipe), expected)
    SnellaAttnProcessor.remove(pipe.unet)
    assert torch.equal(draw(pipe), expected)
    pipe.fuse_snella(0.5)
    pipe.unfuse_snella()
    pipe.set_snella_sparsity(0.95)
    assert not torch.equal(draw(pipe), expected)
    pipe.set_snella_sparsity(None)
    assert torch.equal(draw(pipe), expected)
    pipe.unload_snella_weights()
    assert torch.equal(draw(pipe), base)
