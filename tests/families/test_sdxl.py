"""Stable Diffusion XL: sizes and crops, the empty prompt, schedulers."""

from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline

from snell_diffusion.diffusion.encoded import text_fingerprint
from snell_diffusion.diffusion.families import sdxl
from snell_diffusion.errors import SnellaBaseError
from tests.families.conftest import Case, make_case
from tests.families.stock import PROMPTS, stock_steps


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("sdxl", tmp_path_factory.mktemp("sdxl") / "base")


@torch.no_grad()
def test_geometry_is_what_the_stock_pipeline_calls_sizes_and_crops(case: Case) -> None:
    """A photo of 40 x 24 pixels whose crop begins 3 pixels from the top and 5 from the left."""
    geometry = torch.tensor([[40.0, 24.0, 3.0, 5.0, 16.0, 16.0]]).expand(2, -1)
    stock, pipe = case.stock(), sdxl.load(str(case.folder))
    sizes = {"original_size": (40, 24), "crops_coords_top_left": (3, 5), "target_size": (16, 16)}
    output, t, sample = stock_steps(case, stock, 1, **sizes)[0]
    asked = {**sdxl.encode_text(pipe, PROMPTS), "geometry": geometry}
    ours = sdxl.denoise(pipe.unet, sample, t.expand(2), asked)
    torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)
    other = sdxl.denoise(pipe.unet, sample, t.expand(2), {**asked, "geometry": geometry.flip(1)})
    assert not torch.allclose(other, output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_the_base_was_trained_with(case: Case, zeros: bool) -> None:
    pipe = sdxl.load(str(case.folder))
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, negative, _, negative_pooled = pipe.encode_prompt(PROMPTS)
    ours = sdxl.encode_text(pipe, ["", "a cat"])
    assert ours["text"][0].any() != zeros
    assert ours["text"][1].any()
    torch.testing.assert_close(ours["text"][0], negative[0])
    torch.testing.assert_close(ours["pooled"][0], negative_pooled[0])
    assert text_fingerprint(sdxl.FAMILY, pipe)["force_zeros_for_empty_prompt"] == str(zeros)


def test_a_base_of_another_kind_of_diffusion_is_refused(case: Case, tmp_path: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(case.folder, scheduler=EDMEulerScheduler())
    pipe.save_pretrained(tmp_path)
    with pytest.raises(SnellaBaseError, match="has the scheduler EDMEulerScheduler, which is not"):
        sdxl.load(str(tmp_path))
