"""What a finished classification run leaves and returns."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_diffusion.vision.classifier import Classifier
from snell_diffusion.vision.measure import Measurement
from snell_diffusion.vision.method import Sizes


@dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
        output_dir: The run folder; None where nothing was written.
        adapter_path: The adapter file, or what the method leaves in its place.
        adapter_bytes: Its size; 0 for the linear probe.
        head_bytes: Size of the head's file.
        classifier: The trained model with the weights that were kept, ready to predict.
        classes: Class names.
        validation: Results on the images that epochs were chosen on, with the weights kept.
        test: Results on the test images, looked at once, after the choice; None where not at all.
        sizes: Layers and parameters.
        steps_per_epoch: Optimizer steps of an epoch.
        step: The last optimizer step.
        kept_step: The step whose weights were kept.
        stopped_early: Whether early stopping ended the run.
        seconds: Wall time of this process's part of the run, loading included.
        train_seconds: The part of it between the first step and the last.
        peak_memory: Most memory in bytes: GPU tensors on CUDA, else resident memory of the process.
        history: Every event of this process, as in log.jsonl.
        level: The sparsity level chosen among `levels`; None without a search.
        tried: By level of a search its validation accuracy.
    """

    output_dir: Path | None
    adapter_path: Path | None
    adapter_bytes: int
    head_bytes: int
    classifier: Classifier
    classes: tuple[str, ...]
    validation: Measurement
    test: Measurement | None
    sizes: Sizes
    steps_per_epoch: int
    step: int
    kept_step: int
    stopped_early: bool
    seconds: float
    train_seconds: float
    peak_memory: int
    history: list[dict[str, Any]]
    level: float | None = None
    tried: dict[float, float] = dataclasses.field(default_factory=dict)

    @property
    def validation_accuracy(self) -> float:
        """Share found on the images that epochs were chosen on, 0 to 1."""
        return self.validation.accuracy

    @property
    def test_accuracy(self) -> float | None:
        """Share found on the test images, 0 to 1; None where they were not looked at."""
        return None if self.test is None else self.test.accuracy

    def to_json(self) -> dict[str, Any]:
        """Plain values for result.json; model and events are left out."""
        return {
            "classes": list(self.classes),
            "validation": self._part(self.validation),
            "test": None if self.test is None else self._part(self.test),
            "sizes": {**dataclasses.asdict(self.sizes), "trainable": self.sizes.trainable},
            "adapter_bytes": self.adapter_bytes,
            "head_bytes": self.head_bytes,
            "steps_per_epoch": self.steps_per_epoch,
            "step": self.step,
            "kept_step": self.kept_step,
            "stopped_early": self.stopped_early,
            "seconds": round(self.seconds, 2),
            "train_seconds": round(self.train_seconds, 2),
            "peak_memory": self.peak_memory,
            "level": self.level,
            "tried": {str(level): accuracy for level, accuracy in self.tried.items()},
        }

    def _part(self, measured: Measurement) -> dict[str, Any]:
        return {
            "accuracy": measured.accuracy,
            "loss": measured.loss,
            "images": len(measured.labels),
            "per_class": measured.per_class(len(self.classes)),
        }
