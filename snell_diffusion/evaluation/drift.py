"""How far an adapter moves the base on prompts that do not name the subject.

    drift = mean ||f_adapted(x_t, t, c) - f_base(x_t, t, c)||^2 / mean ||f_base(x_t, t, c)||^2

over fixed prompts c, fixed pictures of the base for those prompts, fixed timesteps and fixed noise.
0 means that the base is untouched there. Shapes: P prompts, T timesteps, C latent channels, h x w
latents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.validation import fixed_timesteps

PROMPTS = (
    "a photo of a {}",
    "a {} in the snow",
    "a {} on the beach",
    "a red {}",
    "a {} on the grass",
    "a blue {} in front of a brick wall",
)
"""Class prompts without the token; `{}` is the class word."""

OTHERS = ("a photo of a {}", "a {} on the beach")
"""Prompts for classes other than the subject's: the leak to neighbours counts too."""


def class_prompts(class_word: str, other_classes: tuple[str, ...] = ()) -> list[str]:
    """Prompts of one subject's class, then of `other_classes`."""
    own = [prompt.format(class_word) for prompt in PROMPTS]
    return own + [prompt.format(other) for other in other_classes for prompt in OTHERS]


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **before})


@dataclass(frozen=True)
class DriftProbe:
    """Fixed inputs of the denoiser and what the base answers to them.

    Attributes:
        inputs: noisy latents, (P*T, C, h, w).
        timesteps: training timesteps, (P*T,), 0 to 999.
        embeddings: text states of the base's encoder, (P*T, L, D).
        answers: the base's predictions, (P*T, C, h, w).
    """

    inputs: Tensor
    timesteps: Tensor
    embeddings: Tensor
    answers: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, pipe: Any, prompts: list[str], timesteps: int = 6, steps: int = 20, seed: int = 0
    ) -> "DriftProbe":
        """Fix the probe on the bare base.

        Args:
            pipe: Stable-Diffusion-type pipeline without adapters.
            prompts: prompts c, at least one.
            timesteps: how many timesteps T, spread evenly over the noise schedule.
            steps: denoising steps of the pictures the noise is added to.
            seed: of pictures and noise.
        """
        with quiet(pipe):
            x0 = pipe(
                prompts,
                num_inference_steps=steps,
                guidance_scale=1.0,
                output_type="latent",
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
            ).images
        scheduler = pipe.scheduler
        total = scheduler.config.num_train_timesteps
        t = torch.tensor(fixed_timesteps(timesteps, total))
        t, x0 = t.repeat(len(prompts)), x0.repeat_interleave(timesteps, 0)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0)
        states = pipe.encode_prompt(prompts, x0.device, 1, False)[0]
        states = states.repeat_interleave(timesteps, 0)
        x_t = scheduler.add_noise(x0, noise, t.to(x0.device))
        answers = predict(pipe.unet, x_t, t, states)
        return cls(x_t, t, states, answers)

    @torch.no_grad()
    def measure(self, pipe: Any) -> float:
        """Drift of the pipeline as it stands, at least 0; embeddings are the base's own."""
        moved = predict(pipe.unet, self.inputs, self.timesteps, self.embeddings)
        return float((moved - self.answers).square().mean() / self.answers.square().mean())


def predict(unet: Any, x_t: Tensor, t: Tensor, states: Tensor, batch: int = 32) -> Tensor:
    """The denoiser's predictions, (N, C, h, w), in chunks of `batch`."""
    chunks = zip(x_t.split(batch), t.to(x_t.device).split(batch), states.split(batch), strict=True)
    return torch.cat([unet(x, s, encoder_hidden_states=c).sample for x, s, c in chunks])
