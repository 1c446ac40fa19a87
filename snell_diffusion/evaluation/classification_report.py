"""From records of classification runs to a table, two pictures and one JSON file."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, BinaryIO

from snell_diffusion.evaluation.bootstrap import interval
from snell_diffusion.evaluation.classification_plan import Plan, Shots
from snell_diffusion.evaluation.classification_records import Record, at_edge


@dataclass(frozen=True)
class Cell:
    """Test accuracies of one task, number of shots and method, one per seed that has ended well.

    Attributes:
        accuracies: Shares, 0 to 1.
        failed: Runs that diverged.
    """

    accuracies: tuple[float, ...]
    failed: int = 0

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN where no run ended well."""
        return mean(self.accuracies) if self.accuracies else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        if not self.accuracies:
            return "diverged" if self.failed else ""
        text = f"{100 * self.mean:.1f} ± {100 * self.spread:.1f}"
        return f"{text} ({self.failed} diverged)" if self.failed else text


@dataclass(frozen=True)
class Difference:
    """Mean difference to the reference method on the same images and seeds, with its interval.

    Attributes:
        mean: In test accuracy, -1 to 1; above 0 = better than the reference.
        low: Lower end of the 95 % bootstrap interval over seeds.
        high: Its upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class Row:
    """One method on one task.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        cells: By number of shots.
        few: Mean test accuracy over all numbers of shots but "all"; NaN where there is none.
        difference: To the reference, averaged over all numbers of shots; None for itself.
        rates: Learning rates by number of shots.
        edges: Numbers of shots whose best trial is the lowest or highest rate tried.
        trainable: Trained numbers without the head.
        stored: Bytes stored beside the base, head included, with all images.
    """

    task: str
    method: str
    cells: dict[Shots, Cell]
    few: float
    difference: Difference | None
    rates: dict[Shots, float]
    edges: tuple[Shots, ...]
    trainable: int
    stored: int


def summarize(plan: Plan, records: Sequence[Record], trials: Sequence[Record]) -> list[Row]:
    """One row per task and method that has records, in the plan's order."""
    rows = []
    for task in plan.tasks:
        here = [record for record in records if record.task == task]
        reference = {(r.shots, r.seed): r for r in here if r.method == plan.reference}
        for method in plan.methods:
            mine = [record for record in here if record.method == method]
            if mine:
                tried = [t for t in trials if (t.task, t.method) == (task, method)]
                rows.append(_row(plan, task, method, mine, tried, reference))
    return rows


def _row(
    plan: Plan,
    task: str,
    method: str,
    mine: Sequence[Record],
    trials: Sequence[Record],
    reference: dict[tuple[Shots, int], Record],
) -> Row:
    by_shots = {shots: [r for r in mine if r.shots == shots] for shots in plan.shots}
    by_shots = {shots: some for shots, some in by_shots.items() if some}
    cells = {
        shots: Cell(
            tuple(r.test_accuracy for r in some if r.test_accuracy is not None),
            sum(bool(r.failed) for r in some),
        )
        for shots, some in by_shots.items()
    }
    few = [cell.mean for shots, cell in cells.items() if shots != "all"]
    most = by_shots.get("all", list(by_shots.values())[-1])
    tried = {t.shots for t in trials}
    return Row(
        task=task,
        method=method,
        cells=cells,
        few=mean(few) if few else math.nan,
        difference=None if method == plan.reference else difference(mine, reference),
        rates={shots: some[0].learning_rate for shots, some in by_shots.items()},
        edges=tuple(
            shots
            for shots in plan.tune.shots
            if shots in tried and at_edge([t for t in trials if t.shots == shots], method)
        )
        if plan.tune
        else (),
        trainable=max(r.trainable for r in mine),
        stored=max(r.adapter_bytes + r.head_bytes for r in most),
    )


def difference(
    mine: Sequence[Record], reference: dict[tuple[Shots, int], Record]
) -> Difference | None:
    """Compare with the reference run by run: same seed, so the same images.

    Differences are averaged over shots for each seed; seeds are what is drawn again and again for
    the interval, for they are what varies. None where fewer than two seeds are shared.
    """
    by_seed: dict[int, list[float]] = {}
    for record in mine:
        other = reference.get((record.shots, record.seed))
        if other is None or record.test_accuracy is None or other.test_accuracy is None:
            continue
        by_seed.setdefault(record.seed, []).append(record.test_accuracy - other.test_accuracy)
    if len(by_seed) < 2:
        return None
    found = interval({("seeds", seed): mean(values) for seed, values in by_seed.items()})
    return Difference(found.mean, found.low, found.high)


def table(plan: Plan, rows: Sequence[Row]) -> str:
    """The rows as Markdown, one table per task, the best accuracy of each column in bold."""
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        shots = [s for s in plan.shots if any(s in row.cells for row in mine)]
        best = {s: max(row.cells[s].mean for row in mine if s in row.cells) for s in shots}
        names = " | ".join("all images" if s == "all" else f"{s} per class" for s in shots)
        lines = [
            f"Test accuracy on {task} in percent, mean ± standard deviation over seeds.",
            "",
            f"| method | {names} | against {plan.reference} | trained numbers | stored bytes "
            "| learning rates |",
            "|---|" + "---|" * (len(shots) + 4),
        ]
        for row in mine:
            cells = [_cell(row, s, best[s]) for s in shots]
            lines.append(
                f"| {row.method} | {' | '.join(cells)} | {row.difference or 'itself'} "
                f"| {_size(plan, row)} | {row.stored:,} | {_rates(row)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _legend(plan, rows)])


def _cell(row: Row, shots: Shots, best: float) -> str:
    cell = row.cells.get(shots)
    if cell is None:
        return ""
    return f"**{cell}**" if cell.mean == best else str(cell)


def _size(plan: Plan, row: Row) -> str:
    text = f"{row.trainable:,}"
    if plan.budget is None or not row.trainable:
        return text
    off = row.trainable / plan.budget - 1
    return text if abs(off) < 0.01 else f"{text} ({100 * off:+.0f} %)"


def _rates(row: Row) -> str:
    found = dict.fromkeys(f"{rate:g}" for rate in row.rates.values())
    return ", ".join(found) + ("*" if row.edges else "")


def _legend(plan: Plan, rows: Sequence[Row]) -> str:
    lines = [
        f"`against {plan.reference}`: mean difference in percentage points over the same images "
        "and seeds, all columns together, with the 95 % bootstrap interval over seeds. "
        "Trained numbers leave the head out, stored bytes include it."
    ]
    if plan.budget is not None:
        lines.append(
            f"Methods aim at {plan.budget:,} trained numbers; who differs says by how much."
        )
    if plan.tune is not None:
        trials = len(plan.tune.learning_rates)
        lines.append(
            f"Every method tried {trials} learning rates on validation images"
            + (" (*: its best one is the lowest or highest tried)." if _any_edge(rows) else ".")
        )
    return " ".join(lines)


def _any_edge(rows: Sequence[Row]) -> bool:
    return any(row.edges for row in rows)


def plot_shots(plan: Plan, rows: Sequence[Row], path: Path | BinaryIO) -> None:
    """Test accuracy against training images per class, a panel per task, a line per method."""
    from matplotlib.figure import Figure

    from snell_diffusion.evaluation.plots import styles

    looks = styles(list(plan.methods))
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(4 + 6 * len(tasks), 5.5), layout="constrained")
    shots = list(plan.shots)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in (row for row in rows if row.task == task):
            found = [(shots.index(s), cell) for s, cell in row.cells.items() if cell.accuracies]
            places = [place for place, _ in found]
            means = [100 * cell.mean for _, cell in found]
            errors = [100 * cell.spread for _, cell in found]
            axes.errorbar(
                *(places, means, errors),
                **looks[row.method],
                markersize=4,
                capsize=2,
                linewidth=1.2,
                label=row.method,
            )
        axes.set_xticks(range(len(shots)), [str(s) for s in shots])
        axes.set_xlabel("training images per class")
        axes.set_ylabel("test accuracy in percent (bars: standard deviation over seeds)")
        axes.set_title(task)
        axes.grid(alpha=0.3)
    _legend_once(figure)
    figure.savefig(path, dpi=100)


def plot_parameters(plan: Plan, rows: Sequence[Row], path: Path | BinaryIO) -> None:
    """Test accuracy against trained numbers, the head apart, a panel per task and kind of shots."""
    from matplotlib.figure import Figure

    from snell_diffusion.evaluation.plots import styles

    looks = styles(list(plan.methods))
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(11, 4.5 * len(tasks)), layout="constrained")
    for (left, right), task in zip(
        figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True
    ):
        for row in (row for row in rows if row.task == task):
            whole = row.cells.get("all")
            for axes, value in ((left, row.few), (right, whole.mean if whole else math.nan)):
                if not math.isnan(value):
                    axes.plot(
                        *(max(1, row.trainable), 100 * value),
                        **looks[row.method],
                        linestyle="",
                        label=row.method,
                    )
        left.set_title(f"{task}, mean over few-shot columns")
        right.set_title(f"{task}, all images")
        for axes in (left, right):
            axes.set_xscale("symlog", linthresh=10_000)
            axes.set_xlabel("trained numbers without the head")
            axes.set_ylabel("test accuracy in percent")
            axes.grid(alpha=0.3)
    _legend_once(figure)
    figure.savefig(path, dpi=100)


def _legend_once(figure: Any) -> None:
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside right center")


def write_report(
    plan: Plan, records: Sequence[Record], trials: Sequence[Record], output: Path
) -> str:
    """Write table.md, shots.png, parameters.png and results.json; returns the table.

    results.json holds every record and trial, so that the page can be made again without the runs.
    """
    rows = summarize(plan, records, trials)
    text = table(plan, rows)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(text + "\n", "utf-8")
    results = {
        "records": [asdict(record) for record in records],
        "trials": [asdict(trial) for trial in trials],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    plot_shots(plan, rows, output / "shots.png")
    plot_parameters(plan, rows, output / "parameters.png")
    return text
