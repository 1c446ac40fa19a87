"""FLUX.1 and FLUX.2: packing, guidance as an input, shifts."""

import math

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from snell_diffusion.diffusion.families import flux, flux2
from snell_diffusion.diffusion.packing import grid, pack, unpack
from snell_diffusion.diffusion.timesteps import TimestepSettings
from tests.families import tiny_flux, tiny_flux2
from tests.families.conftest import CPU

PLAIN = TimestepSettings(weighting_scheme="none")


def test_packing_is_that_of_the_stock_pipeline() -> None:
    latents = torch.randn(2, 3, 4, 6)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(tokens, 4, 6), latents)
    stock = FluxPipeline._prepare_latent_image_ids(2, 2, 3, CPU, torch.float32)
    assert torch.equal(grid(2, 3, CPU), stock[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("guided", [True, False])
def test_training_asks_dev_at_guidance_one_and_schnell_without(guided: bool) -> None:
    pipe = tiny_flux.pipeline(guidance_embeds=guided)
    seen = {}
    pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, named: seen.update(named), with_kwargs=True
    )
    asked = flux.encode_text(pipe, ["a cat", ""])
    noisy = torch.randn(2, 4, 8, 8)
    flux.denoise(pipe.transformer, noisy, torch.tensor([900.0, 40.0]), asked)
    assert (seen["guidance"] is None) != guided
    if guided:
        assert seen["guidance"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("pixels, mu", [(256**2, 0.5), (1024**2, 1.15), (512**2, 0.63)])
def test_dev_is_trained_at_the_shift_of_its_size(pixels: int, mu: float) -> None:
    """At 256, 1024 and 512 pixels a side; a token of the real model covers 16 x 16 pixels."""
    pipe = tiny_flux.pipeline(use_dynamic_shifting=True)
    pipe.vae_scale_factor = 8
    middle = flux.objective(pipe, CPU, PLAIN).timesteps(torch.tensor([0.5]), pixels)
    assert middle.item() == pytest.approx(1000 * math.exp(mu) / (1 + math.exp(mu)), rel=1e-5)


def test_schnell_is_trained_without_shift() -> None:
    pipe = tiny_flux.pipeline(guidance_embeds=False)
    middle = flux.objective(pipe, CPU, PLAIN).timesteps(torch.tensor([0.5]), 1024**2)
    assert middle.item() == pytest.approx(500)


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_klein_is_trained_at_the_shift_of_many_steps(side: int) -> None:
    pipe = tiny_flux2.pipeline()
    pipe.vae_scale_factor = 8
    objective = flux2.objective(pipe, CPU, PLAIN)
    tokens = (side // 16) ** 2
    many = 0.00016927 * tokens + 0.45666666  # what the pipeline's mu is at 200 steps
    assert compute_empirical_mu(tokens, 200) == pytest.approx(many)
    assert compute_empirical_mu(tokens, 4) >= many
    middle = objective.timesteps(torch.tensor([0.5]), side**2)
    assert middle.item() == pytest.approx(1000 * math.exp(many) / (1 + math.exp(many)), rel=1e-5)
