"""The loss of a training step and the measuring probes, built from photos and a model."""

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from snell_diffusion.diffusion.batches import Batches, Concept, Latents, TextTable
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.losses import dreambooth_loss, squared_error
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.diffusion.validation import Probe
from snell_diffusion.diffusion.views import Draws, PixelReader
from snell_diffusion.training.finite import require_sound
from snell_diffusion.training.parallel import Parallel

_NAMED = 4


class StepLoss:
    """The loss of any (step, micro-batch): what `training.loop` minimises."""

    def __init__(self, config: TrainConfig, model: Model, batches: Batches) -> None:
        self._config, self._model, self._batches = config, model, batches
        self._errors: dict[tuple[int, int], Tensor] = {}

    def __call__(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch, objective = self._batches(step, micro), self._model.objective
        noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = objective.target(batch.latents, batch.noise, batch.timesteps)
        prediction = self._model.family.denoise(
            self._model.denoiser, noisy, batch.timesteps, batch.conditions
        )
        errors = squared_error(prediction, target)
        if micro == 0:
            self._errors = {}
        self._errors[step, micro] = errors.detach()
        return dreambooth_loss(
            errors,
            objective.weight(batch.timesteps),
            batch.instances,
            self._config.prior_loss_weight,
        )

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
) -> StepLoss:
    """Encode the photos (and class images, where there are any) into a step loss.

    Args:
        config: The run.
        model: The base with its adapters.
        instance: Photos of the subject.
        class_images: Class images, or none.
        parallel: The processes.
        closing: Ends the processes that read photos ahead.

    Raises:
        NonFiniteError: Cached latents or embeddings are not finite; names photos and prompts.
    """
    plan = [("instance", instance, config.train_batch_size)]
    if class_images:
        plan.append(("class", class_images, config.class_batch_size or config.train_batch_size))
    concepts = [
        Concept(
            Draws(config, name, photos, batch, parallel.rank, parallel.world),
            Latents(model, photos, config, name),
        )
        for name, photos, batch in plan
    ]
    text = _text_table(config, model, [p.prompt for _, photos, _ in plan for p in photos])
    _require_sound([c.latents for c in concepts], text, parallel)
    reader = PixelReader([c.draws for c in concepts], config)
    closing.callback(reader.close)
    return StepLoss(config, model, Batches(config, concepts, text, model, reader))


def build_probe(
    config: TrainConfig, model: Model, photos: Sequence[Photo], parallel: Parallel
) -> Probe | None:
    """Measure on these photos with their prompts; None without photos.

    Raises:
        NonFiniteError: Latents or cached embeddings are not finite; names photos and prompts.
    """
    if not photos:
        return None
    prompts = [p.prompt for p in photos]
    latents = Latents(model, photos, config, "probe")
    text = _text_table(config, model, prompts)
    means = latents.means()
    _require_sound([latents], text, parallel)
    return Probe(model, text, means, prompts, config.validation_timesteps, config.resolution)


def _text_table(config: TrainConfig, model: Model, prompts: Sequence[str]) -> TextTable:
    return TextTable(model, prompts, cached=not config.train_text_encoder)


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
