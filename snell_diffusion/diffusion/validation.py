"""Loss and drift from the base on fixed photos, timesteps and noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from snell_diffusion.diffusion.batches import TextTable, square_geometry
from snell_diffusion.diffusion.families import Conditions
from snell_diffusion.diffusion.losses import squared_error
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.training.adapter_tensors import adapters_off, evaluating
from snell_diffusion.training.randomness import normal

_SEED = 20_240_401
_BATCH = 16


def fixed_timesteps(count: int, num_timesteps: int) -> list[int]:
    """The middles of `count` equal parts of the schedule, for example 62, 187, ... of 1000."""
    return [int((i + 0.5) * num_timesteps / count) for i in range(count)]


class Probe:
    """Measures predictions on fixed noisy latents; the same numbers for the same weights.

    Noise and timesteps do not depend on the run's seed, so different runs can be compared.

    Args:
        model: The base with its adapters.
        text: Encoded prompts; must know every prompt given here.
        latents: Mean latents of the photos, [N, C, h, w].
        prompts: One prompt per photo.
        timesteps: How many fixed timesteps per photo, at least 1.
        size: Side of the photos in pixels.
    """

    def __init__(
        self,
        model: Model,
        text: TextTable,
        latents: Tensor,
        prompts: Sequence[str],
        timesteps: int,
        size: int,
    ) -> None:
        self._model, self._text, self._size = model, text, size
        self._base_answers: Tensor | None = None
        fixed = fixed_timesteps(timesteps, model.objective.num_timesteps)
        pairs = [(i, k) for i in range(len(latents)) for k in range(len(fixed))]
        shape = tuple(latents.shape[1:])
        noise = torch.stack([normal(shape, _SEED, "held-out", i, k) for i, k in pairs])
        self._latents = torch.stack([latents[i] for i, _ in pairs])
        self._noise = noise.to(latents.device)
        self._timesteps = torch.tensor([fixed[k] for _, k in pairs], device=latents.device)
        self._prompts = [prompts[i] for i, _ in pairs]

    def _predictions(self) -> Tensor:
        model = self._model
        noisy = model.objective.add_noise(self._latents, self._noise, self._timesteps)
        with evaluating(model.components):
            count = len(self._prompts)
            conditions = self._text(self._prompts)
            conditions |= {"geometry": square_geometry(count, self._size, noisy.device)}
            parts = []
            for rows in torch.arange(len(noisy)).split(_BATCH):
                some: Conditions = {k: v[rows] for k, v in conditions.items()}
                t = self._timesteps[rows]
                parts.append(model.family.denoise(model.denoiser, noisy[rows], t, some).float())
        return torch.cat(parts)

    def loss(self) -> float:
        """Mean squared error over photos and timesteps, unweighted."""
        target = self._model.objective.target(self._latents, self._noise, self._timesteps)
        return float(squared_error(self._predictions(), target).mean())

    def base_loss(self) -> float:
        """The same loss of the base model, adapters off."""
        with adapters_off(self._model.components):
            return self.loss()

    def drift(self) -> float:
        """Change of the predictions by the adapter: |adapted - base|^2 / |base|^2, 0 at best."""
        adapted = self._predictions()
        if self._base_answers is None:
            with adapters_off(self._model.components):
                self._base_answers = self._predictions()
        base = self._base_answers
        return float((adapted - base).square().mean() / base.square().mean())
