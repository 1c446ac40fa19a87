"""Photos -> training batches, from caches in memory; every batch is a function of (seed, step).

Sample `i` of a step's global batch gets its photo, noise and timestep from counters, so neither the
number of processes nor a resume changes what is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo, to_unit
from snell_diffusion.diffusion.families import Conditions
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.diffusion.timesteps import stratified_quantiles
from snell_diffusion.diffusion.views import CENTRE, Draws, PixelReader, View, read_square
from snell_diffusion.training.randomness import generator, normal

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
    """Encoded prompts: once, where the text encoder is frozen; anew each time, where it trains.

    Attributes:
        problems: Cached prompts whose embedding holds NaN or infinite values.
    """

    def __init__(self, model: Model, prompts: Sequence[str], cached: bool) -> None:
        self._model = model
        self._rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        self._table: Conditions | None = None
        self.problems: list[str] = []
        if cached:
            with torch.no_grad():
                self._table = self._encode(list(self._rows))
            sound = [finite_rows(table) for table in self._table.values()]
            self.problems = [
                f"prompt '{prompt}'"
                for prompt, *finite in zip(self._rows, *sound, strict=True)
                if not all(finite)
            ]

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
        config: Resolution, flips, cache, seed.
        name: Purpose of the random draws, for example "instance".

    Attributes:
        problems: Cached photos whose latents hold NaN or infinite values.
    """

    def __init__(
        self, model: Model, photos: Sequence[Photo], config: TrainConfig, name: str
    ) -> None:
        self._model, self._photos = model, photos
        self._config, self._name = config, name
        self._cache: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self.problems: list[str] = []
        if config.cache_latents:
            for flip in (False, True) if config.random_flip else (False,):
                self._fill(flip)

    @torch.no_grad()
    def _fill(self, flip: bool) -> None:
        for start in range(0, len(self._photos), _ENCODE_BATCH):
            indices = range(start, min(start + _ENCODE_BATCH, len(self._photos)))
            photos = [self._photos[i] for i in indices]
            pixels = [read_square(p, self._config, View(CENTRE, flip)) for p in photos]
            mean, std = self._encode(torch.stack(pixels))
            sound = finite_rows(mean + std)
            for row, index in enumerate(indices):
                self._cache[index, flip] = mean[row], std[row]
                if not sound[row]:
                    self.problems.append(f"photo '{photos[row].path}'")

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.family.encode_images(self._model.pipe, to_unit(pixels))

    @torch.no_grad()
    def draw(self, index: int, view: View, pixels: Tensor | None, *counters: int) -> Tensor:
        """A sample of the latents of photo `index`, [C, h, w].

        Args:
            index: Which photo.
            view: How it is shown.
            pixels: It as shown, uint8 [3, S, S]; None takes the cache.
            counters: What the sample's noise is drawn from.
        """
        if pixels is None:
            mean, std = self._cache[index, view.flip]
        else:
            mean, std = (part[0] for part in self._encode(pixels[None]))
        noise = normal(tuple(mean.shape), self._config.seed, f"{self._name}-posterior", *counters)
        return mean + std * noise.to(mean.device)

    @torch.no_grad()
    def means(self) -> Tensor:
        """The mean latents of every photo, uncropped by chance, [N, C, h, w]."""
        if not self._cache:
            self._fill(False)
        return torch.stack([self._cache[i, False][0] for i in range(len(self._photos))])


def finite_rows(tensor: Tensor) -> list[bool]:
    """Which rows of [B, ...] hold finite values only."""
    sound: list[bool] = tensor.isfinite().flatten(1).all(1).tolist()
    return sound


def square_geometry(count: int, size: int, device: torch.device) -> Tensor:
    """Conditions["geometry"] of whole square pictures, [count, 6]."""
    row = torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32, device=device)
    return row.expand(count, -1)


@dataclass(frozen=True)
class Concept:
    """Photos that share a purpose (instance or class): their stream and their latents."""

    draws: Draws
    latents: Latents


class Batches:
    """Draw the batch of any (step, micro-batch).

    Args:
        config: Seed, timesteps, cache.
        concepts: The subject, then the class where there is one.
        text: Encoded prompts.
        model: The base.
        reader: Reads the pixels where latents are not cached.
    """

    def __init__(
        self,
        config: TrainConfig,
        concepts: Sequence[Concept],
        text: TextTable,
        model: Model,
        reader: PixelReader,
    ) -> None:
        self._config, self._concepts, self._text = config, concepts, text
        self._objective = model.objective
        self._device, self._reader = model.device, reader

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch of optimizer step `step` (1, 2, ...) and micro-batch `micro` (0, 1, ...)."""
        noise, timesteps, prompts = [], [], []
        latents = self._latents(step, micro)
        for concept in self._concepts:
            timesteps.append(self._timesteps(concept.draws, step, micro))
            for place in concept.draws.places():
                shape, purpose = tuple(latents[0].shape), f"{concept.draws.name}-noise"
                noise.append(normal(shape, self._config.seed, purpose, step, micro, place))
                index = concept.draws.index(step, micro, place)
                prompts.append(concept.draws.photos[index].prompt)
        return Batch(
            latents=torch.stack(latents).to(self._device),
            noise=torch.stack(noise).to(self._device),
            timesteps=torch.cat(timesteps).to(self._device),
            conditions={
                **self._text(prompts),
                "geometry": square_geometry(len(prompts), self._config.resolution, self._device),
            },
            instances=self._concepts[0].draws.batch,
        )

    def _latents(self, step: int, micro: int) -> list[Tensor]:
        """The latents of this process's samples, concept by concept."""
        cached = self._config.cache_latents
        pixels = None if cached else self._reader(step, micro)
        found = []
        for number, concept in enumerate(self._concepts):
            draws = concept.draws
            for row, place in enumerate(draws.places()):
                counters = step, micro, place
                shown = None if pixels is None else pixels[number][row]
                index, view = draws.index(*counters), draws.view(*counters)
                found.append(concept.latents.draw(index, view, shown, *counters))
        return found

    def describe(self, step: int, micro: int) -> list[str]:
        """Photo, timestep and unsound latents of every sample of a batch, for messages."""
        names = []
        sound = finite_rows(torch.stack(self._latents(step, micro)))
        for concept in self._concepts:
            draws = concept.draws
            timesteps = self._timesteps(draws, step, micro).tolist()
            for place, timestep in zip(draws.places(), timesteps, strict=True):
                photo = draws.photos[draws.index(step, micro, place)]
                bad = "" if sound[len(names)] else ", whose latents are not finite,"
                names.append(f"photo '{photo.path}'{bad} at timestep {timestep}")
        return names

    def _timesteps(self, draws: Draws, step: int, micro: int) -> Tensor:
        count = draws.batch * draws.world
        seeded = generator(self._config.seed, f"{draws.name}-timestep", step, micro)
        quantiles = torch.rand(count, generator=seeded)
        if self._config.timestep_sampling == "stratified":
            quantiles = stratified_quantiles(quantiles)
        places = draws.places()
        mine = quantiles[places.start : places.stop]
        return self._objective.timesteps(mine, self._config.resolution**2)
