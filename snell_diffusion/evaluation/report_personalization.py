"""The section of a page on personalization: tables, plots, samples, and what they show in words."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from snell_diffusion.evaluation import plots
from snell_diffusion.evaluation.bootstrap import Interval, leaders
from snell_diffusion.evaluation.content import Block, Code, Figure, Heading, Paragraph, Table
from snell_diffusion.evaluation.results import Personalization
from snell_diffusion.evaluation.summary import (
    DRIFT,
    LOSS,
    MEASURES,
    Measure,
    Row,
    frontier,
    points,
    rows,
)
from snell_diffusion.evaluation.tuning import at_edge, rate_losses

_KIB, _MIB = 1024, 2**20


def section(results: Personalization) -> list[Block]:
    """All blocks of the section."""
    found = rows(results.records, results.reference)
    style = plots.styles([row.method for row in found])
    return [
        Heading("Personalization"),
        *_about(results),
        *_verdict(results, found),
        _quality(found, results),
        _against(found, results),
        _cost(found),
        *_pictures(results, found, style),
        *_tuning(results, found),
        *_subjects(results),
        *_samples(results),
    ]


def _about(results: Personalization) -> Iterator[Block]:
    plan, about = results.plan, results.about
    subjects = sorted({record.subject for record in results.records})
    seeds = sorted({record.seed for record in results.records})
    yield Paragraph(
        f"{len(results.records)} runs on the base {plan.get('base', '?')}: subjects "
        f"{', '.join(subjects)}; seeds {', '.join(map(str, seeds))}. Every run trains on all "
        "photos of a subject but one. Held-out loss is the denoiser's mean squared error on that "
        "one, at fixed timesteps with fixed noise, after training divided by before. Class drift "
        "is how far the predictions for prompts without the token moved from the base's, squared "
        "and relative. Brackets are 95 % bootstrap intervals over subjects and seeds."
        + _drawn(plan.get("images"))
    )
    yield Code(str(about.get("command", "")))
    yield Paragraph(
        f"Measured on {about.get('date', '?')} with {about.get('threads', '?')} thread(s) of "
        f"{about.get('machine', '?')}, torch {about.get('torch', '?')}, Python "
        f"{about.get('python', '?')}."
    )


def _drawn(images: Any) -> str:
    if not isinstance(images, dict) or not images.get("prompts"):
        return ""
    said = {name: images.get(name, "?") for name in ("prompts", "per_prompt", "steps", "guidance")}
    return (
        " Drawn were {prompts} of the protocol's 25 prompts, {per_prompt} pictures each, in "
        "{steps} steps with guidance {guidance}.".format(**said)
    )


def _verdict(results: Personalization, found: Sequence[Row]) -> Iterator[Block]:
    """Who wins, from the numbers alone."""
    yield Heading("What it shows", 3)
    for measure in (m for m in MEASURES if any(m.name in row.values for row in found)):
        values = {row.method: points(results.records, row.method, measure) for row in found}
        best, *close = leaders(values, measure.lower_is_better)
        kind = "Lowest" if measure.lower_is_better else "Highest"
        rest = f"not told apart from it: {', '.join(close)}" if close else "all others are worse"
        yield Paragraph(f"{kind} {measure.title}: {best} ({_shown(found, best, measure)}); {rest}.")
    front = frontier(found)
    if front:
        yield Paragraph(
            f"Lower loss can be had for more drift, so a method is better only where it is better "
            f"in one and no worse in the other. Beaten by none in both means at once, from the "
            f"lowest loss to the lowest drift: {', '.join(front)}."
        )


def _shown(found: Sequence[Row], method: str, measure: Measure) -> str:
    (row,) = (row for row in found if row.method == method)
    return _interval(row.values[measure.name], measure.digits)


def _interval(value: Interval | None, digits: int, sign: bool = False) -> str:
    """Mean and interval with so many decimals, or two digits where that would show nothing."""
    if value is None:
        return ""
    plus = "+" if sign else ""
    kind = f"{plus}.{digits}f" if abs(value.mean) >= 10**-digits else f"{plus}.1e"
    mean = f"{value.mean:{kind}}"
    if math.isnan(value.low):
        return mean
    return f"{mean} [{value.low:{kind}}, {value.high:{kind}}]"


def _measured(found: Sequence[Row]) -> list[Measure]:
    return [m for m in MEASURES if any(m.name in row.values for row in found)]


def _quality(found: Sequence[Row], results: Personalization) -> Table:
    measures = _measured(found)
    lines = []
    for row in found:
        cells = [_interval(row.values.get(m.name), m.digits) for m in measures]
        lines.append([row.method, _runs(row), *cells])
    scored = {r.subject: r for r in results.base if r.scores}
    if scored:
        cells = [_base_score(list(scored.values()), m) for m in measures]
        lines.append(["(the base)", "", *cells])
    head = ["method", "runs", *(m.title for m in measures)]
    return Table(
        head,
        lines,
        f"Means and intervals, the reference in bold.{_spaces(results)}",
        results.reference,
    )


def _runs(row: Row) -> str:
    return f"{row.runs}, {row.failed} diverged" if row.failed else str(row.runs)


def _base_score(records: Sequence[Any], measure: Measure) -> str:
    values = [v for v in (measure.read(r) for r in records) if v is not None]
    return f"{sum(values) / len(values):.{measure.digits}f}" if values else ""


def _spaces(results: Personalization) -> str:
    """In which model's space each score of pictures was taken."""
    spaces: dict[str, set[str]] = {}
    for record in results.records:
        for name, score in record.scores.items():
            spaces.setdefault(name, set()).add(str(score.get("space")))
    if not spaces:
        return ""
    told = [f"{name} in {' and '.join(sorted(of))}" for name, of in sorted(spaces.items())]
    return f" Measured on pictures: {'; '.join(told)}."


def _against(found: Sequence[Row], results: Personalization) -> Table:
    measures = _measured(found)
    lines = []
    for row in found:
        if row.method == results.reference or not row.pairs:
            continue
        cells = [_interval(row.against.get(m.name), m.digits, sign=True) for m in measures]
        wins = [f"{count} of {row.pairs}" for count in row.wins]
        lines.append([row.method, *cells, *wins])
    head = ["method", *(m.title for m in measures), "lower loss", "lower drift", "both at once"]
    return Table(
        head,
        lines,
        f"Differences from {results.reference}, run by run (same subject and seed), and how many "
        f"runs are better. An interval without 0 is a difference that the runs support.",
    )


def _cost(found: Sequence[Row]) -> Table:
    lines = []
    for row in found:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / _MIB:.0f}"
        stored = "" if math.isnan(row.stored_bytes) else f"{row.stored_bytes / _KIB:,.0f}"
        rates = ", ".join(f"{rate:g}" for rate in row.rates)
        lines.append([row.method, f"{row.trainable:,}", stored, peak, rates])
    return Table(
        ["method", "trained numbers", "stored, KiB", "peak memory, MiB", "learning rate"],
        lines,
        "Cost: medians over runs. Peak memory is what the training took beyond what the process "
        "held before it.",
    )


def _pictures(
    results: Personalization, found: Sequence[Row], style: plots.Style
) -> Iterator[Block]:
    methods = [row.method for row in found]
    yield Heading("Plots", 3)
    yield Figure(
        "tradeoff",
        plots.tradeoff(found, results.trials, style),
        "Held-out loss against class drift, one point per method with its intervals, and beside it "
        "the learning rates that were tried.",
    )
    yield Figure(
        "costs",
        plots.costs(found, style),
        "Held-out loss against trained numbers, stored bytes and peak memory of every method.",
    )
    if any(record.curve for record in results.records):
        yield Figure(
            "curves",
            plots.curves(results.records, methods, style),
            "Held-out loss over the steps of training, one line per method.",
        )
    if results.kept:
        yield Figure(
            "kept",
            plots.kept_map(results.kept),
            "Share of each layer's update that is kept, methods by layers.",
            "Kept weights: the share of the entries of each layer's update that is not zero, mean "
            "over runs, through the network. Methods whose update is dense are not listed.",
        )
    if results.maps:
        yield Figure(
            "maps",
            plots.map_sheet(results.maps),
            "Which entries of one layer's weight each sparse method changes.",
            "The entries that one run changes in one layer, the nearest to the middle of those it "
            "changes in part: rows are outputs, columns inputs, dark is changed.",
        )


def _tuning(results: Personalization, found: Sequence[Row]) -> Iterator[Block]:
    """The learning rates that were tried, and what they gave."""
    if not results.trials:
        return
    tune = results.plan.get("tune") or {}
    yield Heading("Learning rates", 3)
    edges = [row.method for row in found if _at_edge(results, row.method)]
    beyond = (
        f" At the edge of what was tried, so that a better one may lie beyond: {', '.join(edges)}."
        if edges
        else ""
    )
    yield Paragraph(
        f"Every method tried the same number of learning rates on "
        f"{', '.join(tune.get('subjects', []))} (seed {tune.get('seed', '?')}), on photos that no "
        f"reported number is measured on, and took the one with the lowest held-out loss.{beyond}"
    )
    lines = []
    for row in found:
        losses = rate_losses(results.trials, row.method)
        if losses:
            cells = [f"{rate:g}: {_loss(loss)}" for rate, loss in losses.items()]
            lines.append([row.method, ", ".join(f"{rate:g}" for rate in row.rates), *cells])
    width = max((len(line) for line in lines), default=2)
    head = ["method", "chosen", *[f"tried {i}" for i in range(1, width - 1)]]
    padded = [[*line, *[""] * (width - len(line))] for line in lines]
    yield Table(head, padded, "Rate: mean held-out loss of the trials, after / before.")


def _at_edge(results: Personalization, method: str) -> bool:
    losses = rate_losses(results.trials, method)
    if not losses or min(losses.values()) == math.inf:
        return False
    return at_edge(results.trials, method)


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def _subjects(results: Personalization) -> Iterator[Block]:
    """One row per method, one column per subject."""
    yield Heading("By subject", 3)
    subjects = list(dict.fromkeys(record.subject for record in results.records))
    for measure in (LOSS, DRIFT):
        lines = []
        for method in dict.fromkeys(record.method for record in results.records):
            cells = []
            for subject in subjects:
                values = [
                    value
                    for record in results.records
                    if (record.method, record.subject) == (method, subject)
                    and (value := measure.read(record)) is not None
                ]
                cells.append(f"{sum(values) / len(values):.{measure.digits}f}" if values else "")
            lines.append([method, *cells])
        yield Table(["method", *subjects], lines, f"Mean {measure.title} over seeds.")


def _samples(results: Personalization) -> Iterator[Block]:
    if not results.sheets:
        return
    yield Heading("Samples side by side", 3)
    yield Paragraph(
        "The first seed of every method, the same start noise in each column. The first row is the "
        "base."
    )
    for subject, data in results.sheets.items():
        yield Figure(f"samples {subject}", data, f"Samples of every method for {subject}.", subject)
