"""The loss of a training step and the measuring probes, built from photos and a model."""

from collections.abc import Sequence

from accelerate import Accelerator
from torch import Tensor

from snell_diffusion.diffusion.batches import Batches, Concept, Latents, TextTable
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.losses import dreambooth_loss, squared_error
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.diffusion.validation import Probe


class StepLoss:
    """The loss of any (step, micro-batch): what `training.loop` minimises."""

    def __init__(self, config: TrainConfig, model: Model, batches: Batches) -> None:
        self._config, self._model, self._batches = config, model, batches

    def __call__(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch, objective = self._batches(step, micro), self._model.objective
        noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = objective.target(batch.latents, batch.noise, batch.timesteps)
        prediction = self._model.family.denoise(
            self._model.denoiser, noisy, batch.timesteps, batch.conditions
        )
        return dreambooth_loss(
            squared_error(prediction, target),
            objective.weight(batch.timesteps, self._config.snr_gamma),
            batch.instances,
            self._config.prior_loss_weight,
        )


def build_loss(
    config: TrainConfig,
    model: Model,
    instance: Sequence[Photo],
    class_images: Sequence[Photo],
    accelerator: Accelerator,
) -> StepLoss:
    """Encode the photos (and class images, where there are any) into a step loss."""
    plan = [("instance", instance, config.train_batch_size)]
    if class_images:
        plan.append(("class", class_images, config.class_batch_size or config.train_batch_size))
    concepts = [
        Concept(name, photos, Latents(model, photos, config, name), batch)
        for name, photos, batch in plan
    ]
    text = _text_table(config, model, [p.prompt for _, photos, _ in plan for p in photos])
    return StepLoss(config, model, Batches(config, concepts, text, model, accelerator))


def build_probe(config: TrainConfig, model: Model, photos: Sequence[Photo]) -> Probe | None:
    """Measure on these photos with their prompts; None without photos."""
    if not photos:
        return None
    prompts = [p.prompt for p in photos]
    latents = Latents(model, photos, config, "probe").means()
    text = _text_table(config, model, prompts)
    return Probe(model, text, latents, prompts, config.validation_timesteps)


def _text_table(config: TrainConfig, model: Model, prompts: Sequence[str]) -> TextTable:
    return TextTable(model, prompts, cached=not config.train_text_encoder)
