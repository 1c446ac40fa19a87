"""Pictures of a classification run: its curves and its confusions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from snell_diffusion.training.files import write_with
from snell_diffusion.training.plots import allocation_picture
from snell_diffusion.training.tracking import read_log
from snell_diffusion.vision.results import RunResult

_DPI = 110
_MOST_NAMES = 30  # classes whose names fit beside the picture


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    write_with(path, lambda file: figure.savefig(file, dpi=_DPI), durable=False)


def draw_pictures(folder: Path, result: RunResult) -> None:
    """Write the pictures of a finished run beside its log.jsonl."""
    events = read_log(folder / "log.jsonl")
    training_curve(events, result.steps_per_epoch, result.kept_step, folder / "curve.png")
    if any(event["event"] == "allocation" for event in events):
        allocation_picture(events, folder / "allocation.png")
    shown, name = result.test, "test"
    if shown is None:
        shown, name = result.validation, "validation"
    title = f"{name} images, accuracy {shown.accuracy:.1%}"
    counts = shown.confusion(len(result.classes))
    confusion_picture(counts, result.classes, title, folder / "confusion.png")


def training_curve(events: Sequence[dict[str, Any]], per_epoch: int, kept: int, path: Path) -> None:
    """Loss and accuracy over the epochs, training and validation, and what was kept.

    Args:
        events: Events of the run's log; `step` and `validation` are used.
        per_epoch: Steps of an epoch.
        kept: The step whose weights were kept.
        path: PNG to write.
    """
    steps = [e for e in events if e["event"] == "step"]
    measured = [e for e in events if e["event"] == "validation"]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, key, word in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("cross entropy", "accuracy"), strict=True
    ):
        if steps:
            x, y = _by_epoch([e["step"] for e in steps], [e[key] for e in steps], per_epoch)
            axes.plot(x, y, color="0.6", label="training, mean of the epoch")
        if measured:
            x = [e["step"] / per_epoch for e in measured]
            y = [e[f"validation_{key}"] for e in measured]
            axes.plot(x, y, "o-", color="tab:orange", markersize=3, label="validation")
        axes.axvline(kept / per_epoch, color="tab:blue", linestyle=":", label="kept")
        axes.set_xlabel("epoch")
        axes.set_ylabel(word)
        if key == "accuracy":
            axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _by_epoch(
    steps: Sequence[int], values: Sequence[float], per_epoch: int
) -> tuple[list[int], list[float]]:
    sums: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        sums.setdefault(-(-step // per_epoch), []).append(value)
    return list(sums), [float(np.mean(some)) for some in sums.values()]


def confusion_picture(counts: Tensor, classes: Sequence[str], title: str, path: Path) -> None:
    """Shares of each class (row) that were taken for each class (column).

    Args:
        counts: By true and predicted class, int64 [classes, classes].
        classes: Their names.
        title: Above the picture.
        path: PNG to write.
    """
    share = counts.double().numpy() / np.maximum(1, counts.sum(1, keepdim=True).numpy())
    side = min(12.0, 3 + 0.28 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    if len(classes) <= _MOST_NAMES:
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), names, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=9)
    _save(figure, path)
