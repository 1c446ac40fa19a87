"""Loss and drift from the base on fixed photos, timesteps and noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snell_diffusion.diffusion.encoded import Shown, TextTable
from snell_diffusion.diffusion.losses import squared_error
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.training.adapter_tensors import adapters_off, evaluating
from snell_diffusion.training.randomness import normal

_SEED = 20_240_401
_BATCH = 16


def fixed_timesteps(count: int, num_timesteps: int) -> list[int]:
    """The middles of `count` equal parts of the schedule, for example 62, 187, ... of 1000."""
    return [int((i + 0.5) * num_timesteps / count) for i in range(count)]


@dataclass(frozen=True)
class _Rows:
    """Noisy photos of one shape, at most `_BATCH` of them."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    geometry: Tensor
    prompts: list[str]
    mask: Tensor | None


class Probe:
    """Measures predictions on fixed noisy latents; the same numbers for the same weights.

    Noise and timesteps do not depend on the run's seed, so different runs can be compared.

    Args:
        model: The base with its adapters.
        text: Encoded prompts; must know every prompt given here.
        photos: The photos as they are shown.
        prompts: One prompt per photo.
        timesteps: How many fixed timesteps per photo, at least 1.
        masked: Whether the loss is weighed by the photos' masks.
    """

    def __init__(
        self,
        model: Model,
        text: TextTable,
        photos: Sequence[Shown],
        prompts: Sequence[str],
        timesteps: int,
        masked: bool = False,
    ) -> None:
        self._model, self._text = model, text
        self._base_answers: list[Tensor] | None = None
        fixed = fixed_timesteps(timesteps, model.objective.num_timesteps)
        by_shape: dict[torch.Size, list[tuple[int, int]]] = {}
        for i, photo in enumerate(photos):
            of_shape = by_shape.setdefault(photo.latents.shape, [])
            of_shape += [(i, k) for k in range(len(fixed))]
        self._rows = [
            _Rows(
                latents=torch.stack([photos[i].latents for i, _ in pairs]),
                noise=_noise(pairs, photos[pairs[0][0]].latents),
                timesteps=torch.tensor([fixed[k] for _, k in pairs], device=model.device),
                geometry=torch.stack([photos[i].geometry for i, _ in pairs]),
                prompts=[prompts[i] for i, _ in pairs],
                mask=torch.stack([photos[i].weights for i, _ in pairs]) if masked else None,
            )
            for whole in by_shape.values()
            for pairs in _chunks(whole)
        ]

    def _predictions(self) -> list[Tensor]:
        self._model.phases.enter("train")
        with evaluating(self._model.components):
            return [self._predicted(rows) for rows in self._rows]

    def _predicted(self, rows: _Rows) -> Tensor:
        model = self._model
        noisy = model.objective.add_noise(rows.latents, rows.noise, rows.timesteps)
        conditions = {**self._text(rows.prompts), "geometry": rows.geometry}
        return model.family.denoise(model.denoiser, noisy, rows.timesteps, conditions).float()

    def loss(self) -> float:
        """Mean squared error over photos and timesteps; timesteps weigh the same."""
        errors = [
            squared_error(answer, self._target(rows), rows.mask)
            for rows, answer in zip(self._rows, self._predictions(), strict=True)
        ]
        return float(torch.cat(errors).mean())

    def _target(self, rows: _Rows) -> Tensor:
        return self._model.objective.target(rows.latents, rows.noise, rows.timesteps)

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
        pairs = list(zip(adapted, self._base_answers, strict=True))
        change = sum(float((moved - base).square().sum()) for moved, base in pairs)
        return change / sum(float(base.square().sum()) for _, base in pairs)


def _chunks(pairs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    return [pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH)]


def _noise(pairs: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    shape = tuple(like.shape)
    rows = [normal(shape, _SEED, "held-out", i, k) for i, k in pairs]
    return torch.stack(rows).to(like.device)
