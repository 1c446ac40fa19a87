"""What a denoiser is trained to predict, and how much each timestep counts. Flow models: flow.py.

    x_t = a_t x_0 + s_t e,  a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t)   arXiv:2006.11239, eq. 4
    epsilon: target e       v: target a_t e - s_t x_0                     arXiv:2202.00512, sec. 4
    min-SNR: w = min(SNR, gamma) / SNR (epsilon), / (SNR + 1) (v)         arXiv:2303.09556, sec. 3.4

Shapes: latents and noise [B, C, H, W]; timesteps [B], integers, 0 to 999.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from snell_diffusion.diffusion.timesteps import TimestepSettings
from snell_diffusion.errors import SnellaConfigError

_PLAIN = TimestepSettings()
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Objective(Protocol):
    """What a family's denoiser learns.

    Attributes:
        num_timesteps: Length of the schedule; timesteps lie between 0 and this.
    """

    num_timesteps: int

    def timesteps(self, quantiles: Tensor, pixels: int) -> Tensor:
        """Draw from the sampling density: quantiles [B] in [0, 1) -> timesteps [B].

        `pixels` is height times width of the training picture, which some shifts depend on.
        """

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents, same shape as `latents` [B, ...]."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should return for them, same shape."""

    def weight(self, timesteps: Tensor) -> Tensor:
        """Weight of each sample's squared error, [B]."""


class DiffusionObjective:
    """Noising, target and weight of a variance-preserving diffusion with discrete timesteps.

    Args:
        alphas_cumprod: abar_t for every timestep, [T], 0 to 1 (0 where the terminal SNR is zero).
        prediction: One of `PREDICTIONS`.
        device: Where the tables live.
        settings: Weight of the timesteps.

    Raises:
        SnellaConfigError: A setting that only flow models have.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction: str,
        device: torch.device | str = "cpu",
        settings: TimestepSettings = _PLAIN,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"the base's prediction_type is '{prediction}'; known: {', '.join(PREDICTIONS)}"
            )
        if settings.weighting_scheme not in (None, "none") or settings.shift is not None:
            raise SnellaConfigError(
                "weighting_scheme and timestep_shift are for flow models; this base predicts "
                f"{prediction}: leave them out, or use snr_gamma"
            )
        self._snr_gamma = settings.snr_gamma
        abar = alphas_cumprod.double()
        self.prediction = prediction
        self.num_timesteps = len(abar)
        self._signal = abar.sqrt().float().to(device)
        self._noise = (1 - abar).sqrt().float().to(device)
        self._snr = (abar / (1 - abar).clamp_min(1e-20)).float().to(device)

    @classmethod
    def of(
        cls,
        scheduler: Any,
        device: torch.device | str = "cpu",
        settings: TimestepSettings = _PLAIN,
    ) -> "DiffusionObjective":
        """Read schedule and prediction type from a diffusers scheduler."""
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type, device, settings)

    def timesteps(self, quantiles: Tensor, pixels: int) -> Tensor:
        """Quantiles [B] in [0, 1) -> timesteps [B], int64, every one as likely."""
        return (quantiles.double() * self.num_timesteps).long().clamp_max(self.num_timesteps - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, same shape as `latents`."""
        signal, sigma = self._at(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should return for x_t, same shape as `latents`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        signal, sigma = self._at(timesteps, latents)
        return signal * noise - sigma * latents

    def weight(self, timesteps: Tensor) -> Tensor:
        """Weight of each sample's squared error, [B]; ones without `snr_gamma`."""
        snr = self._snr[timesteps]
        if self._snr_gamma is None:
            return torch.ones_like(snr)
        clipped = snr.clamp_max(self._snr_gamma)
        if self.prediction == "sample":
            return clipped
        if self.prediction == "v_prediction":
            return clipped / (snr + 1)
        # SNR 0 (zero terminal SNR) would divide 0 by 0; its limit is 1.
        return torch.where(snr > 0, clipped / snr.clamp_min(1e-20), torch.ones_like(snr))

    def _at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.dim() - 1)
        return self._signal[timesteps].view(shape), self._noise[timesteps].view(shape)


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of every sample in float32, [B, ...] -> [B].

    With a mask [B, 1, ...] of weights it is the weighted mean, so that a small subject counts as
    much as one that fills its photo; 0 where all weights are 0.
    """
    squares = (prediction.float() - target.float()).square()
    if mask is None:
        return squares.flatten(1).mean(1)
    weights = mask.expand_as(squares).flatten(1)
    total = weights.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (weights * squares.flatten(1)).sum(1) / total


def dreambooth_loss(
    errors: Tensor, weights: Tensor, instances: int, prior_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Combine per-sample errors: subject photos first, the prior's samples after them.

        L = mean_instance(w e) + prior_weight * mean_prior(w e)     arXiv:2208.12242, eq. 2

    Args:
        errors: Squared error per sample, [B].
        weights: Weight of each sample, [B]: its timestep's, times its concept's.
        instances: How many of the samples are photos of the subject, 1 to B.
        prior_weight: Weight of the prior's mean.

    Returns:
        The loss, 0-d, and its detached parts by name (`loss_instance`, `loss_prior`).
    """
    weighted = weights * errors
    subject = weighted[:instances].mean()
    if instances == len(errors):
        return subject, {"loss_instance": subject.detach()}
    prior = weighted[instances:].mean()
    parts = {"loss_instance": subject.detach(), "loss_prior": prior.detach()}
    return subject + prior_weight * prior, parts
