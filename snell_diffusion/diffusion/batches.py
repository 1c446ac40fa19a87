"""Photos -> training batches; every batch is a function of (seed, step).

Sample `i` of a step's global batch gets its photo, noise and timestep from counters, so neither the
number of processes nor a resume changes what is drawn.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.encoded import Latents, Shown, TextTable, finite_rows
from snell_diffusion.diffusion.families import Conditions
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.diffusion.timesteps import stratified_quantiles
from snell_diffusion.diffusion.views import Draws, PixelReader
from snell_diffusion.training.randomness import generator, normal


@dataclass(frozen=True)
class Samples:
    """Samples of one shape, in the order of the batch.

    Attributes:
        latents: [B, C, h, w].
        noise: The same shape.
        timesteps: [B].
        geometry: See `families.base.Conditions`, [B, 6].
        prompts: What the denoiser is told, B texts.
        weights: Factor on each sample's loss, [B].
        mask: Weight of every latent's squared error, [B, 1, h, w]; None = all count alike.
        answered: How many at the end are held to the base's own answer, and not to their photo.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    geometry: Tensor
    prompts: list[str]
    weights: Tensor
    mask: Tensor | None
    answered: int

    def conditions(self, text: TextTable, first: int = 0) -> Conditions:
        """All that the denoiser is told about the samples from `first` on."""
        return {**text(self.prompts[first:]), "geometry": self.geometry[first:]}


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one process.

    Attributes:
        parts: Its samples, those of equal shape together.
        instances: How many of them are the subject's photos; these come first.
    """

    parts: list[Samples]
    instances: int


@dataclass(frozen=True)
class _Row:
    """One sample before it is stacked."""

    photo: Photo
    shown: Shown
    noise: Tensor
    timestep: Tensor
    prompt: str
    answered: bool = False


@dataclass(frozen=True)
class Concept:
    """Photos that share a purpose (instance or class): their stream and their latents."""

    draws: Draws
    latents: Latents


class Batches:
    """Draw the batch of any (step, micro-batch).

    Args:
        config: Seed, timesteps, cache, prior.
        concepts: The subject's photos, then the class images where there are any.
        model: The base.
        reader: Reads the pixels where latents are not cached.
    """

    def __init__(
        self,
        config: TrainConfig,
        concepts: Sequence[Concept],
        model: Model,
        reader: PixelReader,
    ) -> None:
        self._config, self._concepts = config, concepts
        self._objective = model.objective
        self._device, self._reader = model.device, reader

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch of optimizer step `step` (1, 2, ...) and micro-batch `micro` (0, 1, ...)."""
        rows = self._rows(step, micro)
        parts = [list(part) for _, part in groupby(rows, lambda row: row.shown.latents.shape)]
        return Batch([self._stacked(part) for part in parts], self._concepts[0].draws.batch)

    def _rows(self, step: int, micro: int) -> list[_Row]:
        """The samples of this process: the subject's, then the prior's."""
        cached = self._config.cache_latents
        pixels = None if cached else self._reader(step, micro)
        rows = []
        for number, concept in enumerate(self._concepts):
            given = None if pixels is None else pixels[number]
            rows += self._of_concept(concept, given, step, micro)
        if self._config.with_prior_preservation and self._config.prior_loss == "prediction":
            rows += [_held_to_base(row) for row in rows]
        return rows

    def _of_concept(
        self, concept: Concept, pixels: Tensor | None, step: int, micro: int
    ) -> list[_Row]:
        draws, rows = concept.draws, []
        timesteps = self._timesteps(draws, step, micro)
        for row, place in enumerate(draws.places()):
            counters = step, micro, place
            index, view = draws.index(*counters), draws.view(*counters)
            given = None if pixels is None else pixels[row]
            shown = concept.latents.draw(index, view, given, *counters)
            noise = self._noise(draws.name, shown.latents, *counters)
            photo, prompt = draws.photos[index], draws.prompt(*counters)
            rows.append(_Row(photo, shown, noise, timesteps[row], prompt))
        return rows

    def _noise(self, name: str, like: Tensor, *counters: int) -> Tensor:
        """Standard normal noise, and with `noise_offset` a shift of every channel."""
        seed, shape = self._config.seed, tuple(like.shape)
        noise = normal(shape, seed, f"{name}-noise", *counters)
        if not self._config.noise_offset:
            return noise
        shift = normal((shape[0], 1, 1), seed, f"{name}-noise-offset", *counters)
        return noise + self._config.noise_offset * shift

    def _timesteps(self, draws: Draws, step: int, micro: int) -> Tensor:
        count = draws.batch * draws.world
        seeded = generator(self._config.seed, f"{draws.name}-timestep", step, micro)
        quantiles = torch.rand(count, generator=seeded)
        if self._config.timestep_sampling == "stratified":
            quantiles = stratified_quantiles(quantiles)
        places = draws.places()
        height, width = draws.shape(step, micro)
        mine = quantiles[places.start : places.stop]
        return self._objective.timesteps(mine, height * width)

    def _stacked(self, rows: Sequence[_Row]) -> Samples:
        def stacked(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).to(self._device)

        return Samples(
            latents=stacked(row.shown.latents for row in rows),
            noise=stacked(row.noise for row in rows),
            timesteps=stacked(row.timestep for row in rows),
            geometry=stacked(row.shown.geometry for row in rows),
            prompts=[row.prompt for row in rows],
            weights=torch.tensor([row.photo.weight for row in rows], device=self._device),
            mask=stacked(r.shown.weights for r in rows) if self._config.masked_loss else None,
            answered=sum(row.answered for row in rows),
        )

    def describe(self, step: int, micro: int) -> list[str]:
        """Photo, timestep and unsound latents of every sample of a batch, for messages."""
        return [_described(row) for row in self._rows(step, micro)]


def _held_to_base(row: _Row) -> _Row:
    """The same noisy photo, asked for its class, to be answered as the base does.

    All of it counts: a mask says where the photo shows the subject, but the class prompt is to mean
    the same everywhere, and where the mask is black nothing else would hold it.
    """
    shown = replace(row.shown, weights=torch.ones_like(row.shown.weights))
    return replace(row, shown=shown, prompt=row.photo.prior_prompt, answered=True)


def _described(row: _Row) -> str:
    (sound,) = finite_rows(row.shown.latents[None])
    bad = "" if sound else ", whose latents are not finite,"
    held = f" with prompt '{row.prompt}'" if row.answered else ""
    return f"photo '{row.photo.path}'{bad}{held} at timestep {row.timestep.item()}"
