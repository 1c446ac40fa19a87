"""Targets and weights agree with diffusers' schedulers and with the papers' formulas."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from snell_diffusion.diffusion.losses import (
    DiffusionObjective,
    dreambooth_loss,
    squared_error,
)
from snell_diffusion.diffusion.timesteps import TimestepSettings, stratified_quantiles
from snell_diffusion.errors import SnellaConfigError

GAMMA = TimestepSettings(snr_gamma=5.0)

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def scheduler(prediction: str, zero: bool = False) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero,
    )


def latents() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = (len(TIMESTEPS), 4, 3, 3)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize("zero", [False, True])
def test_noise_and_velocity_are_those_of_diffusers(zero: bool) -> None:
    theirs = scheduler("v_prediction", zero)
    ours = DiffusionObjective.of(theirs)
    x, e = latents()
    torch.testing.assert_close(ours.add_noise(x, e, TIMESTEPS), theirs.add_noise(x, e, TIMESTEPS))
    velocity = theirs.get_velocity(x, e, TIMESTEPS)
    torch.testing.assert_close(ours.target(x, e, TIMESTEPS), velocity)


def test_targets_of_the_other_predictions() -> None:
    x, e = latents()
    assert torch.equal(DiffusionObjective.of(scheduler("epsilon")).target(x, e, TIMESTEPS), e)
    assert torch.equal(DiffusionObjective.of(scheduler("sample")).target(x, e, TIMESTEPS), x)


def test_unknown_prediction_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'flow'; known: epsilon, v_prediction, sample"):
        DiffusionObjective(torch.rand(10), "flow")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction: str) -> None:
    theirs = scheduler(prediction)
    snr = compute_snr(theirs, TIMESTEPS)
    clipped = torch.minimum(snr, torch.tensor(5.0))
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    found = DiffusionObjective.of(theirs, settings=GAMMA).weight(TIMESTEPS)
    torch.testing.assert_close(found, clipped / divisor, rtol=1e-4, atol=1e-7)
    assert torch.equal(DiffusionObjective.of(theirs).weight(TIMESTEPS), torch.ones(len(TIMESTEPS)))


@pytest.mark.parametrize("prediction, last", [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_weights_are_finite_at_zero_terminal_snr(prediction: str, last: float) -> None:
    theirs = scheduler(prediction, zero=True)
    weights = DiffusionObjective.of(theirs, settings=GAMMA).weight(TIMESTEPS)
    assert torch.isfinite(weights).all()
    assert weights[-1] == pytest.approx(last, abs=1e-6)


def test_dreambooth_loss_is_two_means() -> None:
    errors, weights = torch.tensor([1.0, 3.0, 10.0, 20.0, 60.0]), torch.tensor([1.0, 1, 1, 1, 0.5])
    loss, parts = dreambooth_loss(errors, weights, 2, prior_weight=0.1)
    assert parts["loss_instance"] == 2.0
    assert parts["loss_prior"] == 20.0
    assert loss == pytest.approx(2.0 + 0.1 * 20.0)
    alone, parts = dreambooth_loss(errors[:2], weights[:2], 2, prior_weight=0.1)
    assert alone == 2.0
    assert set(parts) == {"loss_instance"}


def test_squared_error_is_per_sample_and_float32() -> None:
    a = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    b = torch.stack([torch.full((3, 4), 2.0), torch.full((3, 4), 300.0)])
    assert squared_error(a, b).tolist() == [4.0, 90000.0]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_stratified_timesteps_fall_into_equal_parts(count: int) -> None:
    for draw in (0.0, 0.5, 1 - 2**-24):
        quantiles = stratified_quantiles(torch.full((count,), draw))
        found = DiffusionObjective.of(scheduler("epsilon")).timesteps(quantiles, 64)
        for part, timestep in enumerate(found.tolist()):
            assert part * 1000 < (timestep + 1) * count
            assert timestep * count < (part + 1) * 1000


def test_uniform_timesteps_cover_the_schedule() -> None:
    quantiles = torch.tensor([0.0, 0.5, 1 - 2**-24])
    found = DiffusionObjective.of(scheduler("epsilon")).timesteps(quantiles, 64)
    assert found.tolist() == [0, 500, 999]


def test_schedulers_of_pipelines_are_read() -> None:
    theirs = DDIMScheduler(prediction_type="v_prediction", num_train_timesteps=100)
    assert DiffusionObjective.of(theirs).num_timesteps == 100


@pytest.mark.parametrize(
    "settings", [TimestepSettings(weighting_scheme="mode"), TimestepSettings(shift=3.0)]
)
def test_settings_of_flow_models_are_refused(settings: TimestepSettings) -> None:
    with pytest.raises(SnellaConfigError, match="are for flow models; this base predicts epsilon"):
        DiffusionObjective.of(scheduler("epsilon"), settings=settings)
