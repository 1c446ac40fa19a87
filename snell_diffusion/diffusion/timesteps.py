"""Where on the noise schedule a batch is trained: quantiles in [0, 1) and the settings above them.

An objective turns quantiles into timesteps by the inverse of its sampling density, so that
stratified draws stay stratified under every density.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WeightingScheme = Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]


@dataclass(frozen=True)
class TimestepSettings:
    """Sampling density of timesteps and weight of their errors.

    Attributes:
        snr_gamma: Min-SNR weight of diffusion models (arXiv:2303.09556); None = none.
        weighting_scheme: Of flow models, as in diffusers' scripts; None = the family's own.
            logit_normal and mode change the density, cosmap and sigma_sqrt the weight.
        logit_mean: Mean of logit_normal (arXiv:2403.03206, eq. 19), above 0 = noisier; diffusers'
            scripts count from the noisy end, so there the same number has the other sign.
        logit_std: Standard deviation of logit_normal, above 0.
        mode_scale: Scale s of mode (arXiv:2403.03206, eq. 20).
        shift: Timestep shift of flow models (arXiv:2403.03206, eq. 23), above 0; None = the base's.
    """

    snr_gamma: float | None = None
    weighting_scheme: WeightingScheme | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float | None = None


def stratified_quantiles(draw: Tensor) -> Tensor:
    """One quantile in each of B equal parts of [0, 1), from uniform `draw` [B]; float64 [B]."""
    # In float32 a part's last draw could round up into the next part.
    return (torch.arange(len(draw)) + draw.double()) / len(draw)
