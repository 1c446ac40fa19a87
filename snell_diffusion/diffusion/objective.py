"""The loss of a training step and the measuring probes, built from photos and a model."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from snell_diffusion.diffusion.batches import Batches, Concept, Samples
from snell_diffusion.diffusion.cache import Cache
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.encoded import Latents, TextTable
from snell_diffusion.diffusion.framing import shapes
from snell_diffusion.diffusion.losses import dreambooth_loss, squared_error
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.diffusion.validation import Probe
from snell_diffusion.diffusion.views import Draws, PixelReader
from snell_diffusion.training.adapter_tensors import adapters_off, evaluating
from snell_diffusion.training.finite import require_sound
from snell_diffusion.training.parallel import Parallel

_NAMED = 4


class StepLoss:
    """The loss of any (step, micro-batch): what `training.loop` minimises."""

    def __init__(
        self, config: TrainConfig, model: Model, batches: Batches, text: TextTable
    ) -> None:
        self._config, self._model, self._batches, self._text = config, model, batches, text
        self._errors: dict[tuple[int, int], Tensor] = {}

    def __call__(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._model.phases.enter("train")
        batch = self._batches(step, micro)
        errors = torch.cat([self._errors_of(part) for part in batch.parts])
        if micro == 0:
            self._errors = {}
        self._errors[step, micro] = errors.detach()
        weight = self._model.objective.weight
        weights = torch.cat([weight(part.timesteps) * part.weights for part in batch.parts])
        return dreambooth_loss(errors, weights, batch.instances, self._config.prior_loss_weight)

    def _errors_of(self, part: Samples) -> Tensor:
        """Squared error of every sample of one shape, [B]."""
        objective, model = self._model.objective, self._model
        noisy = objective.add_noise(part.latents, part.noise, part.timesteps)
        target = objective.target(part.latents, part.noise, part.timesteps)
        if part.answered:
            kept = target[: -part.answered].float()
            target = torch.cat([kept, self._base_answers(part, noisy)])
        conditions = part.conditions(self._text)
        prediction = model.family.denoise(model.denoiser, noisy, part.timesteps, conditions)
        return squared_error(prediction, target, part.mask)

    def _base_answers(self, part: Samples, noisy: Tensor) -> Tensor:
        """What the base alone predicts for the last samples, text encoder included."""
        model, first = self._model, len(noisy) - part.answered
        with evaluating(model.components), adapters_off(model.components):
            conditions = part.conditions(self._text, first)
            timesteps = part.timesteps[first:]
            answers = model.family.denoise(model.denoiser, noisy[first:], timesteps, conditions)
        return answers.float()

    def culprits(self) -> list[str]:
        """Samples of the latest step whose error is not finite."""
        found = []
        for place, errors in self._errors.items():
            sound = errors.isfinite().tolist()
            if not all(sound):
                names = self._batches.describe(*place)
                found += [name for name, ok in zip(names, sound, strict=True) if not ok]
        more = [f"{len(found) - _NAMED} more samples"] if len(found) > _NAMED else []
        return found[:_NAMED] + more


def build_loss(
    config: TrainConfig,
    model: Model,
    instance: Sequence[Photo],
    class_images: Sequence[Photo],
    parallel: Parallel,
    closing: ExitStack,
    cache: Cache | None = None,
) -> StepLoss:
    """Encode the photos (and class images, where there are any) into a step loss.

    Args:
        config: The run.
        model: The base with its adapters.
        instance: Photos of the subject.
        class_images: Class images, or none.
        parallel: The processes.
        closing: Ends the processes that read photos ahead.
        cache: Where photos and prompts may lie encoded already; default: nowhere.

    Raises:
        NonFiniteError: Cached latents or embeddings are not finite; names photos and prompts.
    """
    cache = cache or Cache(None)
    size = config.train_batch_size
    plan = [("instance", instance, size, config.caption_dropout)]
    if class_images:
        plan.append(("class", class_images, config.class_batch_size or size, 0.0))
    known = shapes(config, model.family.multiple)
    ranks = parallel.rank, parallel.world
    streams = [Draws(config, n, photos, b, *ranks, known, drop) for n, photos, b, drop in plan]
    latents = [Latents(model, draws, config, cache) for draws in streams]
    if config.cache_latents:
        for some in latents:
            some.fill()
    prompts = [prompt for draws in streams for prompt in draws.prompts()]
    text = TextTable(model, prompts, model.text_is_frozen, cache)
    _require_sound(latents, text, parallel)
    reader = PixelReader(streams, config)
    closing.callback(reader.close)
    concepts = [Concept(*pair) for pair in zip(streams, latents, strict=True)]
    return StepLoss(config, model, Batches(config, concepts, model, reader), text)


def build_probe(
    config: TrainConfig,
    model: Model,
    photos: Sequence[Photo],
    parallel: Parallel,
    cache: Cache | None = None,
) -> Probe | None:
    """Measure on these photos with their prompts; None without photos.

    Raises:
        NonFiniteError: Latents or cached embeddings are not finite; names photos and prompts.
    """
    if not photos:
        return None
    cache = cache or Cache(None)
    prompts = [p.prompt for p in photos]
    draws = Draws(config, "probe", photos, 1, 0, 1, shapes(config, model.family.multiple))
    latents = Latents(model, draws, config, cache)
    text = TextTable(model, prompts, model.text_is_frozen, cache)
    shown = [latents.mean(index) for index in range(len(photos))]
    _require_sound([latents], text, parallel)
    return Probe(model, text, shown, prompts, config.validation_timesteps, config.masked_loss)


def _require_sound(latents: Sequence[Latents], text: TextTable, parallel: Parallel) -> None:
    require_sound(
        list(dict.fromkeys(problem for some in latents for problem in some.problems)),
        "before step 1: the VAE's latents are NaN or infinite for",
        "Take these photos out; if it is all of them, the base's VAE is damaged",
        parallel,
    )
    require_sound(
        text.problems,
        "before step 1: the text encoder's embedding is NaN or infinite for",
        "Change the prompt; if it is all of them, the base's text encoder is damaged",
        parallel,
    )
