"""One JSON file per classification run: what it measured, and a digest of what that depends on."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean

from snell_diffusion.errors import SnellaConfigError, SnellaFileError
from snell_diffusion.evaluation.classification_plan import Shots
from snell_diffusion.training.files import write_json


@dataclass(frozen=True)
class Record:
    """What one run measured.

    Attributes:
        task: Its name in the plan.
        shots: Training images per class, or "all".
        method: Its name in the plan.
        seed: Seed of the run.
        digest: Of all settings and images that the numbers depend on.
        learning_rate: That it was trained with.
        validation_accuracy: Share found among the validation images, 0 to 1.
        validation_loss: Mean cross entropy on them.
        test_accuracy: Share found among the test images; None for a trial, which has none.
        trainable: Trained numbers, those of the head left out.
        head: Numbers of the head.
        adapter_bytes: Size of what is stored beside the base; 0 for the linear probe.
        head_bytes: Size of the head's file.
        steps: Optimizer steps.
        seconds: Wall time of the run.
        failed: Why there are no numbers: the run diverged; "" for one that ended well.
        date: When it was measured, UTC.
    """

    task: str
    shots: Shots
    method: str
    seed: int
    digest: str
    learning_rate: float
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    test_accuracy: float | None = None
    trainable: int = 0
    head: int = 0
    adapter_bytes: int = 0
    head_bytes: int = 0
    steps: int = 0
    seconds: float = 0.0
    failed: str = ""
    date: str = ""


def save_record(path: Path, record: Record) -> None:
    """Write a record in one step."""
    write_json(path, asdict(record), durable=False)


def read_record(path: Path) -> Record:
    """Read what `save_record` wrote.

    Raises:
        SnellaFileError: The file cannot be read, or is no record.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        unknown = sorted(set(values) - {item.name for item in fields(Record)})
        if unknown:
            raise TypeError(f"unknown: {', '.join(unknown)}")
        return Record(**values)
    except (OSError, ValueError, TypeError) as error:
        raise SnellaFileError(
            f"{path}: not a readable record of a run: {error}; remove it to measure again"
        ) from error


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, sorted by file name.

    Raises:
        SnellaFileError: One cannot be read.
    """
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def rate_scores(trials: Iterable[Record]) -> dict[float, tuple[float, float]]:
    """(mean validation accuracy, - mean validation loss) by learning rate; higher is better.

    One diverged trial makes a rate infinitely bad.
    """
    found: dict[float, list[Record]] = {}
    for trial in trials:
        found.setdefault(trial.learning_rate, []).append(trial)
    scores = {}
    for rate, some in sorted(found.items()):
        accuracies = [t.validation_accuracy for t in some if t.validation_accuracy is not None]
        losses = [t.validation_loss for t in some if t.validation_loss is not None]
        whole = len(accuracies) == len(losses) == len(some)
        scores[rate] = (mean(accuracies), -mean(losses)) if whole else (-math.inf, -math.inf)
    return scores


def best_rate(trials: Iterable[Record], what: str) -> float:
    """The learning rate with the best score; of equal ones the lowest.

    Args:
        trials: Those of one task, method and number of shots.
        what: These, for the error.

    Raises:
        SnellaConfigError: There is no trial, or none ended well.
    """
    scores = rate_scores(trials)
    if not scores or max(scores.values())[0] == -math.inf:
        raise SnellaConfigError(f"{what}: no trial ended with a finite loss; try lower rates")
    return max(scores, key=lambda rate: (*scores[rate], -rate))


def at_edge(trials: Iterable[Record], what: str) -> bool:
    """Whether the best rate is the lowest or highest tried, so that a better one may lie beyond."""
    trials = list(trials)
    rates = list(rate_scores(trials))
    return len(rates) > 1 and best_rate(trials, what) in (rates[0], rates[-1])
