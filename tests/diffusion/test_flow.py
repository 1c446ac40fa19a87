"""The flow objective agrees with diffusers' scheduler and with its training helpers."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from snell_diffusion.diffusion.flow import FlowObjective, scheduler_shift
from snell_diffusion.diffusion.timesteps import TimestepSettings, stratified_quantiles
from snell_diffusion.errors import SnellaConfigError


def objective(scheme: str = "none", shift: float = 1.0, **settings) -> FlowObjective:
    return FlowObjective(lambda pixels: shift, TimestepSettings(**settings), scheme)


def test_noise_is_that_of_the_scheduler_and_the_target_leads_back() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(0)
    x, e = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = theirs.timesteps[[10, 700]]
    ours = objective()
    noisy = ours.add_noise(x, e, t)
    torch.testing.assert_close(noisy, theirs.scale_noise(x, t, e))
    back = noisy - (t / 1000).view(-1, 1, 1, 1) * ours.target(x, e, t)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_static_shift_gives_the_schedulers_levels(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = FlowObjective(scheduler_shift(theirs, 256), TimestepSettings())
    quantiles = torch.arange(1, 1000) / 1000
    torch.testing.assert_close(ours.timesteps(quantiles, 512**2), theirs.timesteps.flip(0)[:-1])


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_the_schedulers_at_that_size(kind: str) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)  # 512 x 512 pixels in tokens of 16 x 16
    theirs.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=mu)
    ours = FlowObjective(scheduler_shift(theirs, 256), TimestepSettings())
    found = ours.timesteps(torch.tensor([0.9, 0.5, 0.1]), 512**2)
    torch.testing.assert_close(found, theirs.timesteps)


def test_settings_replace_the_bases_shift() -> None:
    found = FlowObjective(lambda pixels: 3.0, TimestepSettings(shift=1.0))
    assert found.timesteps(torch.tensor([0.25]), 64).item() == pytest.approx(250)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_densities_are_those_of_diffusers(scheme: str) -> None:
    numbers = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": 1.2}
    drawn = compute_density_for_timestep_sampling(
        scheme, 200_000, generator=torch.Generator().manual_seed(0), **numbers
    )
    quantiles = stratified_quantiles(torch.full((10_000,), 0.5))
    ours = objective(scheme, **numbers).timesteps(quantiles, 64) / 1000
    levels = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(
        ours.sort().values.quantile(levels), drawn[:200_000].quantile(levels), rtol=0, atol=6e-3
    )


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal"])
def test_weights_are_those_of_diffusers(scheme: str) -> None:
    sigmas = torch.tensor([0.05, 0.5, 0.95])
    theirs = compute_loss_weighting_for_sd3(scheme, sigmas)
    torch.testing.assert_close(objective(scheme).weight(1000 * sigmas), theirs)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt"])
def test_the_ends_of_the_path_stay_finite(scheme: str) -> None:
    found = objective(scheme)
    timesteps = found.timesteps(torch.tensor([0.0, 1 - 2**-24]), 64)
    assert timesteps.min() >= 1
    assert timesteps.max() <= 1000
    assert found.weight(timesteps).isfinite().all()


def test_the_settings_scheme_replaces_the_familys() -> None:
    assert objective("logit_normal").scheme == "logit_normal"
    assert objective("logit_normal", weighting_scheme="none").scheme == "none"


def test_min_snr_is_refused() -> None:
    with pytest.raises(SnellaConfigError, match=r"snr_gamma .* flow model"):
        objective(snr_gamma=5.0)


def test_half_of_a_shifted_path() -> None:
    middle = objective(shift=math.e).timesteps(torch.tensor([0.5]), 64)
    assert middle.item() == pytest.approx(1000 * math.e / (1 + math.e))
