"""What `python -m snell_diffusion.compress` can work on: a classifier, or a pipeline's denoiser.

A job has read its model and its data; a fifth of the data is held out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snell_diffusion.compress.distill import Distiller, DistillSettings
from snell_diffusion.compress.sources import (
    Call,
    Pictures,
    denoiser_of,
    read_pictures,
    recorded_calls,
    replay,
)
from snell_diffusion.errors import SnellaBaseError, SnellaFileError, SnellaValueError

__all__ = ["ClassifierJob", "Job", "PipelineJob", "is_pipeline"]

HELD_OUT = 0.2  # share of the pictures, or of the batches of prompts
MEASURED_AT_ONCE = 100  # pictures
Say = Callable[[str], None]


class Job(Protocol):
    """A teacher and the data to train its student on.

    Attributes:
        teacher: The original model.
        labelled: Whether there is a task's loss.
        held_out: Pictures or calls that are never trained on.
    """

    teacher: nn.Module
    labelled: bool
    held_out: int

    def distiller(self, student: nn.Module, settings: DistillSettings) -> Distiller:
        """Student and teacher together."""

    def batch_at(self, step: int) -> Any:
        """The batch of a step, a function of seed and step."""

    def measure(self, distiller: Distiller) -> dict[str, float]:
        """Parts of the loss, and shares where there are answers, on what was held out."""


class ClassifierJob:
    """A classifier of transformers and a folder of pictures.

    Args:
        model: Folder or hub id.
        images: The folder; labels are the names of the folders that the pictures lie in, if all of
            them are names of the model's classes.
        batch: Pictures per step.
        seed: Of the split and the batches.
        say: Takes a line.

    Raises:
        SnellaBaseError: There is no such classifier.
        SnellaFileError: There are no pictures.
        SnellaValueError: There is only one.
    """

    def __init__(self, model: str, images: Path, batch: int, seed: int, say: Say) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            self.teacher = AutoModelForImageClassification.from_pretrained(
                model, use_safetensors=True
            ).float()
            processor = AutoImageProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise SnellaBaseError(f"no image classifier in {model}: {error}") from error
        known = self.teacher.config.label2id
        self._pixels, self._labels = read_pictures(images, processor, known)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._pixels), generator=draw)
        self.held_out = max(1, round(HELD_OUT * len(order)))
        if self.held_out == len(order):
            raise SnellaValueError(f"{images} must hold 2 pictures or more: one is held out")
        self._test, self._train = order[: self.held_out], order[self.held_out :]
        self._batch, self._seed = batch, seed
        self.labelled = self._labels is not None
        labels = "with" if self.labelled else "without"
        say(f"{len(self._train)} pictures to learn from, {self.held_out} held out, {labels} labels")

    def distiller(self, student: nn.Module, settings: DistillSettings) -> Distiller:
        """Student and teacher, with cross entropy as the task where there are labels."""
        task = Pictures.task if self.labelled else None
        return Distiller(student, self.teacher, Pictures.of, task, settings)

    def batch_at(self, step: int) -> Pictures:
        """Pictures of a step, drawn with replacement."""
        draw = _draw(self._seed, step)
        return self._pictures(
            self._train[torch.randint(len(self._train), (self._batch,), generator=draw)]
        )

    @torch.no_grad()
    def measure(self, distiller: Distiller) -> dict[str, float]:
        """Parts of the loss; how often student and teacher agree, and are right."""
        student = distiller.student.eval()
        batches = [self._pictures(rows) for rows in self._test.split(MEASURED_AT_ONCE)]
        found = distiller.measure(batches)
        ours, theirs = (
            torch.cat([Pictures.of(model, b).argmax(1) for b in batches])
            for model in (student, self.teacher)
        )
        found["agreement"] = _share(ours == theirs)
        if self._labels is not None:
            truth = self._labels[self._test]
            found["accuracy"] = _share(ours == truth)
            found["teacher's accuracy"] = _share(theirs == truth)
        return found

    def _pictures(self, rows: Tensor) -> Pictures:
        return Pictures(self._pixels[rows], None if self._labels is None else self._labels[rows])


class PipelineJob:
    """A diffusers pipeline's denoiser and the calls that the pipeline makes of it.

    Args:
        model: Folder or hub id of the pipeline.
        prompts: Text file, one prompt a line.
        batch: Prompts drawn at once.
        seed: Of the pictures and the batches.
        say: Takes a line.
        sampling: Options of the pipeline's call.

    Raises:
        SnellaBaseError: There is no such pipeline.
        SnellaFileError: The prompts cannot be read.
        SnellaValueError: There are too few prompts, or no denoiser.
    """

    labelled = False

    def __init__(
        self, model: str, prompts: Path, batch: int, seed: int, say: Say, **sampling: Any
    ) -> None:
        from diffusers import DiffusionPipeline

        try:
            lines = [line.strip() for line in prompts.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SnellaFileError(f"{prompts} cannot be read: {error}") from error
        lines = [line for line in lines if line]
        if len(lines) <= batch:
            raise SnellaValueError(
                f"{prompts} must hold more than the {batch} prompts of one batch, since a whole "
                f"batch is held out; it has {len(lines)}"
            )
        try:
            pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
            pipe = pipe.to(torch.float32)
        except (OSError, ValueError) as error:
            raise SnellaBaseError(f"no pipeline in {model}: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        self.name, self.teacher = denoiser_of(pipe)
        drawn = recorded_calls(pipe, lines, batch, seed, say, **sampling)
        kept_out = max(1, round(HELD_OUT * len(drawn)))
        self._train = [call for calls in drawn[:-kept_out] for call in calls]
        self._test = [call for calls in drawn[-kept_out:] for call in calls]
        self.held_out, self._seed = len(self._test), seed
        say(f"{len(self._train)} calls to learn from, {self.held_out} of other prompts held out")

    def distiller(self, student: nn.Module, settings: DistillSettings) -> Distiller:
        """Student and teacher, without a task: the target is what the teacher predicts."""
        return Distiller(student, self.teacher, replay, None, settings)

    def batch_at(self, step: int) -> Call:
        """One recorded call."""
        draw = _draw(self._seed, step)
        return self._train[int(torch.randint(len(self._train), (1,), generator=draw))]

    def measure(self, distiller: Distiller) -> dict[str, float]:
        """Parts of the loss."""
        return distiller.measure(self._test)


def is_pipeline(model: str) -> bool:
    """Whether a folder or hub id is a diffusers pipeline rather than a single model.

    Raises:
        SnellaBaseError: It is neither a folder, nor in the cache, nor found on the hub.
    """
    if Path(model).is_dir():
        return (Path(model) / "model_index.json").is_file()
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name, answer in (("model_index.json", True), ("config.json", False)):
            if isinstance(try_to_load_from_cache(model, name), str):
                return answer
        return bool(file_exists(model, "model_index.json"))
    except (OSError, HFValidationError) as error:
        raise SnellaBaseError(f"{model} is no folder, and the hub has no answer: {error}") from None


def _draw(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def _share(right: Tensor) -> float:
    return float(right.float().mean())
