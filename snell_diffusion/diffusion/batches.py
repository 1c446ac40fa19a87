"""Photos -> training batches, from caches in memory; every batch is a function of (seed, step).

Sample `i` of a step's global batch gets its photo, noise and timestep from counters, so neither the
number of processes nor a resume changes what is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo, open_photo, to_square
from snell_diffusion.diffusion.families import Conditions
from snell_diffusion.diffusion.losses import stratified_timesteps, uniform_timesteps
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.training.randomness import generator, item_at, normal

_ENCODE_BATCH = 4


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one process; the first `instances` samples are the subject's photos."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditions: Conditions
    instances: int


class TextTable:
    """Encoded prompts: once, where the text encoder is frozen; anew each time, where it trains."""

    def __init__(self, model: Model, prompts: Sequence[str], cached: bool) -> None:
        self._model = model
        self._rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        self._table: Conditions | None = None
        if cached:
            with torch.no_grad():
                self._table = self._encode(list(self._rows))

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        if self._table is None:
            return self._encode(prompts)
        rows = [self._rows[prompt] for prompt in prompts]
        return {name: table[rows] for name, table in self._table.items()}

    def _encode(self, prompts: Sequence[str]) -> Conditions:
        return self._model.family.encode_text(self._model.pipe, prompts)


class Latents:
    """The latents of some photos: cached, or encoded when asked for.

    Args:
        model: The base.
        photos: What to encode.
        config: Resolution, crop, flips, cache.
        name: Purpose of the random draws, for example "instance".
    """

    def __init__(
        self, model: Model, photos: Sequence[Photo], config: TrainConfig, name: str
    ) -> None:
        self._model, self._photos = model, photos
        self._config, self._name = config, name
        self._cache: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        if config.cache_latents:
            for flip in (False, True) if config.random_flip else (False,):
                self._fill(flip)

    @torch.no_grad()
    def _fill(self, flip: bool) -> None:
        for start in range(0, len(self._photos), _ENCODE_BATCH):
            indices = range(start, min(start + _ENCODE_BATCH, len(self._photos)))
            pixels = torch.stack([self._pixels(i, (0.5, 0.5), flip) for i in indices])
            mean, std = self._encode(pixels)
            for row, index in enumerate(indices):
                self._cache[index, flip] = mean[row], std[row]

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.family.encode_images(self._model.pipe, pixels)

    def _pixels(self, index: int, crop: tuple[float, float], flip: bool) -> Tensor:
        return to_square(open_photo(self._photos[index].path), self._config.resolution, crop, flip)

    @torch.no_grad()
    def draw(self, index: int, *counters: int) -> Tensor:
        """A sample of the latents of photo `index`, [C, h, w]; crop and flip by the counters."""
        u = torch.rand(3, generator=generator(self._config.seed, f"{self._name}-view", *counters))
        flip = self._config.random_flip and bool(u[0] < 0.5)
        if self._config.cache_latents:
            mean, std = self._cache[index, flip]
        else:
            crop = (0.5, 0.5) if self._config.center_crop else (float(u[1]), float(u[2]))
            pixels = self._pixels(index, crop, flip)[None]
            mean, std = (part[0] for part in self._encode(pixels))
        noise = normal(tuple(mean.shape), self._config.seed, f"{self._name}-posterior", *counters)
        return mean + std * noise.to(mean.device)

    @torch.no_grad()
    def means(self) -> Tensor:
        """The mean latents of every photo, uncropped by chance, [N, C, h, w]."""
        if not self._cache:
            self._fill(False)
        return torch.stack([self._cache[i, False][0] for i in range(len(self._photos))])


@dataclass(frozen=True)
class Concept:
    """Photos that share a purpose (instance or class), with their latents."""

    name: str
    photos: Sequence[Photo]
    latents: Latents
    batch: int


class Batches:
    """Draw the batch of any (step, micro-batch)."""

    def __init__(
        self,
        config: TrainConfig,
        concepts: Sequence[Concept],
        text: TextTable,
        model: Model,
        accelerator: Accelerator,
    ) -> None:
        self._config, self._concepts, self._text = config, concepts, text
        self._num_timesteps = model.objective.num_timesteps
        self._rank, self._world = accelerator.process_index, accelerator.num_processes
        self._device = accelerator.device

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch of optimizer step `step` (1, 2, ...) and micro-batch `micro` (0, 1, ...)."""
        latents, noise, timesteps, prompts = [], [], [], []
        for concept in self._concepts:
            timesteps.append(self._timesteps(concept, step, micro))
            for place in self._places(concept):
                index = self._index(concept, step, micro, place)
                sample = concept.latents.draw(index, step, micro, place)
                purpose = f"{concept.name}-noise"
                latents.append(sample)
                noise.append(
                    normal(tuple(sample.shape), self._config.seed, purpose, step, micro, place)
                )
                prompts.append(concept.photos[index].prompt)
        return Batch(
            latents=torch.stack(latents).to(self._device),
            noise=torch.stack(noise).to(self._device),
            timesteps=torch.cat(timesteps).to(self._device),
            conditions=self._text(prompts),
            instances=self._concepts[0].batch,
        )

    def _places(self, concept: Concept) -> range:
        """Places of this process in the global batch."""
        return range(self._rank * concept.batch, (self._rank + 1) * concept.batch)

    def _index(self, concept: Concept, step: int, micro: int, place: int) -> int:
        done = (step - 1) * self._config.gradient_accumulation_steps + micro
        position = done * concept.batch * self._world + place
        return item_at(position, len(concept.photos), self._config.seed, concept.name)

    def _timesteps(self, concept: Concept, step: int, micro: int) -> Tensor:
        count = concept.batch * self._world
        seeded = generator(self._config.seed, f"{concept.name}-timestep", step, micro)
        draw = torch.rand(count, generator=seeded)
        if self._config.timestep_sampling == "stratified":
            timesteps = stratified_timesteps(count, self._num_timesteps, draw)
        else:
            timesteps = uniform_timesteps(self._num_timesteps, draw)
        places = self._places(concept)
        return timesteps[places.start : places.stop]
