"""The base of a comparison, without adapters of its own: it draws and answers for any family."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.families import Conditions, Family, SampleRequest
from snell_diffusion.diffusion.framing import View, fit, geometry, to_unit
from snell_diffusion.diffusion.loaded import models_of
from snell_diffusion.diffusion.losses import Objective
from snell_diffusion.diffusion.sampling import decoded_at_once, drawn_at_once, to_pictures
from snell_diffusion.diffusion.setup import load_base, timestep_settings


@dataclass(frozen=True)
class Base:
    """A loaded base on its device; an adapter may be put into `pipe` and taken out again.

    Attributes:
        family: How to use it.
        pipe: Its pipeline.
        objective: What its denoiser predicts.
        device: Where it computes.
        size: Side of pictures in pixels.
    """

    family: Family
    pipe: Any
    objective: Objective
    device: torch.device
    size: int

    @classmethod
    def load(cls, config: TrainConfig) -> "Base":
        """The base of a training config, on a GPU where there is one.

        Raises:
            SnellaBaseError: No such base, or no family covers it.
        """
        family, pipe = load_base(config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for model in models_of(pipe).values():
            model.to(device)
        objective = family.objective(pipe, device, timestep_settings(config))
        return cls(family, pipe, objective, device, config.resolution)

    @property
    def denoiser(self) -> nn.Module:
        """The model that adapters change."""
        model: nn.Module = getattr(self.pipe, self.family.denoiser)
        return model

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditions:
        """What the denoiser takes beside latents: encoded prompts and the geometry of a square."""
        square = (self.size, self.size)
        rows = geometry(square, square, View()).expand(len(prompts), -1)
        encoded = self.family.encode_text(self.pipe, list(prompts))
        return {**encoded, "geometry": rows.to(self.device)}

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """Draw one picture per prompt, as latents [B, C, h, w]; guidance 1 = none."""
        parts = []
        at_once = drawn_at_once(self.size)
        for start in range(0, len(prompts), at_once):
            some = list(prompts[start : start + at_once])
            encoded = self.family.encode_text(self.pipe, [*some, ""])
            request = SampleRequest(
                conditions={name: rows[:-1] for name, rows in encoded.items()},
                unconditional={name: rows[-1:] for name, rows in encoded.items()},
                generators=generators[start : start + at_once],
                size=self.size,
                steps=steps,
                guidance=guidance,
            )
            parts.append(self.family.sample(self.pipe, request))
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents [B, C, h, w] to RGB pictures."""
        parts = latents.split(decoded_at_once(self.size))
        pixels = [self.family.decode_latents(self.pipe, part) for part in parts]
        return to_pictures(torch.cat(pixels).nan_to_num(0.0))

    @torch.no_grad()
    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Mean latents of RGB pictures, [B, C, h, w], float32 on the CPU."""
        square = (self.size, self.size)
        pixels = torch.stack([to_unit(fit(picture, square, View())) for picture in pictures])
        parts = pixels.split(decoded_at_once(self.size))
        means = [self.family.encode_images(self.pipe, part.to(self.device))[0] for part in parts]
        return torch.cat(means).float().cpu()

    @torch.no_grad()
    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's predictions for B noisy latents, float32, shaped as they are."""
        found = self.family.denoise(self.denoiser, noisy, timesteps, conditions)
        return found.float()
