"""Pictures and latents of an `AutoencoderKL`, as most families use it.

latents = (z - shift) * scale,  z the VAE's own     scale, shift: its scaling and shift factor
"""

from typing import Any

import torch
from torch import Tensor


def encode_images(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of pixels [B, 3, H, W] in [-1, 1], float32."""
    vae = pipe.vae
    scale, shift = _factors(vae)
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] of latents; see `to_pixels`."""
    vae = pipe.vae
    scale, shift = _factors(vae)
    return to_pixels(vae.decode(latents.to(vae.device, vae.dtype) / scale + shift).sample)


def to_pixels(decoded: Tensor) -> Tensor:
    """What a VAE decodes, about [-1, 1] -> [0, 1], float32 on the CPU; NaN where not finite."""
    pixels = decoded.float().cpu() / 2 + 0.5
    return pixels.clamp(0, 1).where(pixels.isfinite(), torch.nan)


def _factors(vae: Any) -> tuple[float, float]:
    return vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
