"""How far an adapter moves the base on prompts that do not name the subject.

    drift = mean ||f_adapted(x_t, t, c) - f_base(x_t, t, c)||^2 / mean ||f_base(x_t, t, c)||^2

over fixed prompts c, fixed pictures of the base for those prompts, fixed timesteps and fixed noise.
0 means that the base is untouched there. Shapes: P prompts, T timesteps, latents [C, h, w].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from snell_diffusion.diffusion.families import Conditions
from snell_diffusion.diffusion.validation import fixed_timesteps
from snell_diffusion.evaluation.base import Base
from snell_diffusion.training.randomness import generator, normal

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

_BATCH = 32


def class_prompts(class_word: str, other_classes: tuple[str, ...] = ()) -> list[str]:
    """Prompts of one subject's class, then of `other_classes`."""
    own = [prompt.format(class_word) for prompt in PROMPTS]
    return own + [prompt.format(other) for other in other_classes for prompt in OTHERS]


@dataclass(frozen=True)
class DriftProbe:
    """Fixed inputs of the denoiser and what the base answers to them.

    Attributes:
        inputs: noisy latents, [P*T, C, h, w].
        timesteps: training timesteps, [P*T].
        conditions: encoded prompts of the base's own encoders, P*T rows.
        answers: the base's predictions, [P*T, C, h, w].
    """

    inputs: Tensor
    timesteps: Tensor
    conditions: Conditions
    answers: Tensor

    @classmethod
    def of(
        cls, base: Base, prompts: list[str], timesteps: int = 6, steps: int = 20, seed: int = 0
    ) -> "DriftProbe":
        """Fix the probe on the bare base.

        Args:
            base: Without adapters.
            prompts: prompts c, at least one.
            timesteps: how many timesteps T, spread evenly over the noise schedule.
            steps: denoising steps of the pictures the noise is added to.
            seed: of pictures and noise.
        """
        starts = [generator(seed, "drift picture", i) for i in range(len(prompts))]
        x0 = base.latents(prompts, starts, steps=steps, guidance=1.0)
        fixed = fixed_timesteps(timesteps, base.objective.num_timesteps)
        t = torch.tensor(fixed * len(prompts), device=base.device)
        x0 = x0.repeat_interleave(timesteps, 0)
        rows = [normal(tuple(x0.shape[1:]), seed, "drift noise", i) for i in range(len(x0))]
        inputs = base.objective.add_noise(x0, torch.stack(rows).to(x0), t)
        conditions = {
            name: values.repeat_interleave(timesteps, 0)
            for name, values in base.encode(prompts).items()
        }
        return cls(inputs, t, conditions, _predict(base, inputs, t, conditions))

    def measure(self, base: Base) -> float:
        """Drift of the base with what is in it now, at least 0."""
        moved = _predict(base, self.inputs, self.timesteps, self.conditions)
        return float((moved - self.answers).square().mean() / self.answers.square().mean())


def _predict(base: Base, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """The denoiser's predictions, [N, C, h, w], in chunks."""
    chunks = []
    for start in range(0, len(x_t), _BATCH):
        some = slice(start, start + _BATCH)
        part = {name: rows[some] for name, rows in conditions.items()}
        chunks.append(base.denoise(x_t[some], t[some], part))
    return torch.cat(chunks)
