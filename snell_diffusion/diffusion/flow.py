"""Flow matching on straight paths: what the denoiser predicts, and where the paths are sampled.

    x_s = (1 - s) x_0 + s e,  target e - x_0            rectified flow, arXiv:2403.03206, eq. 13
    shift: s -> a s / (1 + (a - 1) s)                   arXiv:2403.03206, eq. 23
    logit-normal and mode densities, cosmap weight      arXiv:2403.03206, sec. 3.1

Timesteps are 1000 s, floats above 0 up to 1000.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.diffusion.timesteps import TimestepSettings, WeightingScheme
from snell_diffusion.errors import SnellaConfigError

NUM_TIMESTEPS = 1000
_SMALLEST = 1 / NUM_TIMESTEPS  # the last noise level of the schedules that these bases are made for

ShiftOf = Callable[[int], float]
"""Timestep shift for training pictures of so many pixels."""


class FlowObjective:
    """Noising, target, density and weight of a flow-matching model.

    Args:
        shift: Timestep shift by the number of pixels of a training picture.
        settings: Density, weight, and a shift that replaces `shift`.
        scheme: The family's weighting scheme, where the settings leave it open.

    Raises:
        SnellaConfigError: A setting that only diffusion models have.
    """

    num_timesteps = NUM_TIMESTEPS

    def __init__(
        self, shift: ShiftOf, settings: TimestepSettings, scheme: WeightingScheme = "none"
    ) -> None:
        if settings.snr_gamma is not None:
            raise SnellaConfigError(
                "snr_gamma (min-SNR) is for models that predict noise or v; this base is a flow "
                "model: leave it out, or choose a weighting_scheme"
            )
        self._shift, self._settings = shift, settings
        self.scheme: WeightingScheme = settings.weighting_scheme or scheme

    def timesteps(self, quantiles: Tensor, pixels: int) -> Tensor:
        """Quantiles [B] in [0, 1) -> timesteps [B], float32, 1 to 1000."""
        sigma = self._density(quantiles.double())
        shift = self._settings.shift or self._shift(pixels)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return (sigma.clamp(_SMALLEST, 1) * NUM_TIMESTEPS).float()

    def _density(self, u: Tensor) -> Tensor:
        settings = self._settings
        if self.scheme == "logit_normal":
            return torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(u))
        if self.scheme == "mode":
            return 1 - u - settings.mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)
        return u

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s, same shape as `latents` [B, ...]."""
        sigma = (timesteps.float() / NUM_TIMESTEPS).view(-1, *(1,) * (latents.dim() - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity e - x_0, same shape as `latents`."""
        return noise - latents

    def weight(self, timesteps: Tensor) -> Tensor:
        """Weight of each sample's squared error, [B]."""
        sigma = timesteps.float() / NUM_TIMESTEPS
        if self.scheme == "sigma_sqrt":
            return sigma.clamp_min(_SMALLEST) ** -2
        if self.scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
        return torch.ones_like(sigma)


def scheduler_shift(scheduler: Any, pixels_per_token: int) -> ShiftOf:
    """The timestep shift that a base's flow scheduler uses when it samples.

    Args:
        scheduler: With `shift`, or with `use_dynamic_shifting` and its four numbers.
        pixels_per_token: Pixels of a picture that one token of the denoiser covers.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        # Schedulers of the DPM family name it so.
        static = float(config.get("shift", config.get("flow_shift", 1.0)))
        return lambda pixels: static
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    exponential = config.get("time_shift_type", "exponential") == "exponential"

    def dynamic(pixels: int) -> float:
        mu = config["base_shift"] + slope * (pixels / pixels_per_token - low)
        return math.exp(mu) if exponential else mu

    return dynamic
