"""What a denoiser is trained to predict, and how much each timestep counts.

    x_t = a_t x_0 + s_t e,  a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t)   arXiv:2006.11239, eq. 4
    epsilon: target e       v: target a_t e - s_t x_0                     arXiv:2202.00512, sec. 4
    min-SNR: w = min(SNR, gamma) / SNR (epsilon), / (SNR + 1) (v)         arXiv:2303.09556, sec. 3.4

Shapes: latents and noise [B, C, H, W]; timesteps [B], integers, 0 to 999.
"""

from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DiffusionObjective:
    """Noising, target and weight of a variance-preserving diffusion with discrete timesteps.

    Args:
        alphas_cumprod: abar_t for every timestep, [T], 0 to 1 (0 where the terminal SNR is zero).
        prediction: One of `PREDICTIONS`.
        device: Where the tables live.
    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction: str, device: torch.device | str = "cpu"
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"the base's prediction_type is '{prediction}'; known: {', '.join(PREDICTIONS)}"
            )
        abar = alphas_cumprod.double()
        self.prediction = prediction
        self.num_timesteps = len(abar)
        self._signal = abar.sqrt().float().to(device)
        self._noise = (1 - abar).sqrt().float().to(device)
        self._snr = (abar / (1 - abar).clamp_min(1e-20)).float().to(device)

    @classmethod
    def of(cls, scheduler: Any, device: torch.device | str = "cpu") -> "DiffusionObjective":
        """Read schedule and prediction type from a diffusers scheduler."""
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type, device)

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

    def weight(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor:
        """Weight of each sample's squared error, [B]; ones where `snr_gamma` is None."""
        snr = self._snr[timesteps]
        if snr_gamma is None:
            return torch.ones_like(snr)
        clipped = snr.clamp_max(snr_gamma)
        if self.prediction == "sample":
            return clipped
        if self.prediction == "v_prediction":
            return clipped / (snr + 1)
        # SNR 0 (zero terminal SNR) would divide 0 by 0; its limit is 1.
        return torch.where(snr > 0, clipped / snr.clamp_min(1e-20), torch.ones_like(snr))

    def _at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.dim() - 1)
        return self._signal[timesteps].view(shape), self._noise[timesteps].view(shape)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample in float32, [B, ...] -> [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def dreambooth_loss(
    errors: Tensor, weights: Tensor, instances: int, prior_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Combine per-sample errors: subject photos first, class images after them.

        L = mean_instance(w e) + prior_weight * mean_class(w e)     arXiv:2208.12242, eq. 2

    Args:
        errors: Squared error per sample, [B].
        weights: Timestep weight per sample, [B].
        instances: How many of the samples are photos of the subject, 1 to B.
        prior_weight: Weight of the class images' mean.

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


def stratified_timesteps(count: int, num_timesteps: int, draw: Tensor) -> Tensor:
    """One timestep in each of `count` equal parts of the schedule, from uniform `draw` [count]."""
    # In float32 a part's last draw could round up into the next part.
    places = torch.arange(count) + draw.double()
    return (places * (num_timesteps / count)).long().clamp_max(num_timesteps - 1)


def uniform_timesteps(num_timesteps: int, draw: Tensor) -> Tensor:
    """Independent uniform timesteps from uniform `draw` in [0, 1), same length."""
    return (draw * num_timesteps).long().clamp_max(num_timesteps - 1)
