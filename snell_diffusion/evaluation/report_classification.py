"""The section of a page on classification: tables and plots of each task, and what they show."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from snell_diffusion.errors import SnellaFileError
from snell_diffusion.evaluation.bootstrap import leaders
from snell_diffusion.evaluation.classification_plan import Plan
from snell_diffusion.evaluation.classification_records import Record, read_records
from snell_diffusion.evaluation.classification_report import (
    Row,
    plot_parameters,
    plot_shots,
    summarize,
)
from snell_diffusion.evaluation.content import Block, Code, Figure, Heading, Paragraph, Table
from snell_diffusion.evaluation.results import ABOUT, read_table
from snell_diffusion.training.files import write_json

KIND = "classification"


@dataclass(frozen=True)
class Classification:
    """A comparison of methods on classification tasks.

    Attributes:
        about: Command, date, machine and versions.
        plan: The plan.
        records: Reported runs.
        trials: Runs that chose learning rates.
    """

    about: dict[str, Any]
    plan: Plan
    records: list[Record]
    trials: list[Record] = field(default_factory=list)


def from_folder(output: Path) -> Classification:
    """What a comparison's folder holds; records of methods that left the plan are left out.

    Raises:
        SnellaFileError: There are no records, or something cannot be read.
    """
    about = read_table(output / ABOUT)
    plan = _plan(about.pop("plan", None), output / ABOUT)
    records = [r for r in read_records(output / "records") if r.method in plan.methods]
    if not records:
        raise SnellaFileError(f"no records in {output / 'records'}: run the comparison first")
    return Classification(about, plan, records, read_records(output / "trials"))


def save(results: Classification, path: Path) -> None:
    """Write results to a file that `load` reads."""
    values = {
        "kind": KIND,
        **results.about,
        "seeds": results.plan.seeds,
        "plan": asdict(results.plan),
        "records": [asdict(record) for record in results.records],
        "trials": [asdict(record) for record in results.trials],
    }
    write_json(path, values)


def load(path: Path) -> Classification:
    """Read what `save` wrote.

    Raises:
        SnellaFileError: It cannot be read, or is something else.
    """
    values = read_table(path)
    if values.pop("kind", None) != KIND:
        raise SnellaFileError(f"{path}: expected results of kind '{KIND}'")
    plan = _plan(values.pop("plan", None), path)
    try:
        records, trials = ([Record(**row) for row in values.pop(k)] for k in ("records", "trials"))
    except (KeyError, TypeError) as error:
        raise SnellaFileError(f"{path}: not complete: {type(error).__name__} {error}") from error
    values.pop("seeds", None)
    return Classification(values, plan, records, trials)


def _plan(values: Any, path: Path) -> Plan:
    try:
        return TypeAdapter(Plan).validate_python(values)
    except ValidationError as error:
        raise SnellaFileError(f"{path}: its plan is none: {error.errors()[0]['msg']}") from error


def section(results: Classification) -> list[Block]:
    """All blocks of the section."""
    plan, about = results.plan, results.about
    rows = summarize(plan, results.records, results.trials)
    return [
        Heading("Classification"),
        Paragraph(
            f"{len(results.records)} runs on the base {plan.base}: tasks {', '.join(plan.tasks)}; "
            f"seeds {', '.join(map(str, plan.seeds))}. Accuracies are on test images that no "
            "choice was made on; learning rates were chosen on validation images, the same number "
            "of rates for every method."
        ),
        Code(str(about.get("command", ""))),
        Paragraph(
            f"Measured on {about.get('date', '?')} with {about.get('threads', '?')} thread(s) of "
            f"{about.get('machine', '?')}, torch {about.get('torch', '?')}, Python "
            f"{about.get('python', '?')}."
        ),
        *_verdict(results),
        *(_table(plan, rows, task) for task in dict.fromkeys(row.task for row in rows)),
        Figure("shots", _drawn(plot_shots, plan, rows), "Test accuracy against images per class."),
        Figure(
            "classification cost",
            _drawn(plot_parameters, plan, rows),
            "Test accuracy against trained numbers.",
        ),
    ]


def _drawn(plot: Any, plan: Plan, rows: Sequence[Row]) -> bytes:
    data = io.BytesIO()
    plot(plan, rows, data)
    return data.getvalue()


def _verdict(results: Classification) -> Iterator[Block]:
    """Who wins with few images and with all, from the numbers alone."""
    yield Heading("What it shows", 3)
    for few in (True, False):
        values: dict[str, dict[tuple[Any, Any], float]] = {}
        for record in results.records:
            if record.test_accuracy is not None and (record.shots != "all") == few:
                key = ((record.task, record.shots), record.seed)
                values.setdefault(record.method, {})[key] = record.test_accuracy
        if values:
            best, *close = leaders(values, lower_is_better=False)
            mean = sum(values[best].values()) / len(values[best])
            rest = (
                f"not told apart from it: {', '.join(close)}" if close else "all others are worse"
            )
            kind = "few images per class" if few else "all images"
            yield Paragraph(
                f"Highest test accuracy with {kind}: {best} ({100 * mean:.1f} %); {rest}."
            )


def _table(plan: Plan, rows: Sequence[Row], task: str) -> Table:
    mine = [row for row in rows if row.task == task]
    shots = [s for s in plan.shots if any(s in row.cells for row in mine)]
    names = ["all images" if s == "all" else f"{s} per class" for s in shots]
    lines = []
    for row in mine:
        cells = [str(row.cells.get(s, "")) for s in shots]
        rates = dict.fromkeys(f"{rate:g}" for rate in row.rates.values())
        lines.append(
            [
                *(row.method, *cells),
                "" if row.difference is None else str(row.difference),
                *(f"{row.trainable:,}", f"{row.stored / 1024:,.1f}"),
                ", ".join(rates) + (" (edge)" if row.edges else ""),
            ]
        )
    head = ["method", *names, f"against {plan.reference}", "trained numbers", "stored, KiB"]
    return Table(
        [*head, "learning rates"],
        lines,
        f"Test accuracy on {task} in percent, mean ± standard deviation over seeds; the "
        "difference is over the same images and seeds, all columns together, with its 95 % "
        "bootstrap interval.",
        plan.reference,
    )
