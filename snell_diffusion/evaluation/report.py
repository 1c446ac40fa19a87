"""From records to a table and two pictures: held-out loss and drift of every variant."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from .comparison import Record


@dataclass(frozen=True)
class Row:
    """One variant over all subjects and seeds it shares with the reference variant.

    `loss` is the held-out loss after / before training, `drift` the relative drift, each with the
    standard deviation over runs; `loss_ratio` and `drift_ratio` divide by the reference on the same
    subject and seed and average; `score` is the mean of both ratios, below 1 = better than it.
    """

    variant: str
    runs: int
    parameters: int
    loss: float
    loss_spread: float
    drift: float
    drift_spread: float
    loss_ratio: float
    drift_ratio: float
    wins: int
    """Runs that are better than the reference in both measures at once."""

    @property
    def score(self) -> float:
        return (self.loss_ratio + self.drift_ratio) / 2


def summarize(records: list[Record], reference: str) -> list[Row]:
    """Rows sorted by score, best first.

    Raises:
        ValueError: the reference variant has no record.
    """
    by_variant: dict[str, dict[tuple[str, int], Record]] = {}
    for record in records:
        by_variant.setdefault(record.variant, {})[record.subject, record.seed] = record
    if reference not in by_variant:
        raise ValueError(f"no record of the reference variant '{reference}'")
    rows = [_row(name, runs, by_variant[reference]) for name, runs in by_variant.items()]
    return sorted((row for row in rows if row is not None), key=lambda row: row.score)


def _row(
    variant: str, runs: dict[tuple[str, int], Record], reference: dict[tuple[str, int], Record]
) -> Row | None:
    shared = sorted(runs.keys() & reference.keys())
    if not shared:
        return None
    pairs = [(runs[key], reference[key]) for key in shared]
    losses = [gain(run) for run, _ in pairs]
    drifts = [run.drift for run, _ in pairs]
    return Row(
        variant,
        len(pairs),
        pairs[0][0].parameters,
        mean(losses),
        _spread(losses),
        mean(drifts),
        _spread(drifts),
        mean(run.loss_after / ref.loss_after for run, ref in pairs),
        mean(run.drift / ref.drift for run, ref in pairs),
        sum(run.loss_after < ref.loss_after and run.drift < ref.drift for run, ref in pairs),
    )


def gain(record: Record) -> float:
    """Held-out loss after training / before it; below 1 = the subject was learned."""
    return record.loss_after / record.loss_before


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| variant | runs | numbers | held-out loss after / before | drift | loss / reference "
        "| drift / reference | mean of both | better in both |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.variant} | {r.runs} | {r.parameters:,} | {r.loss:.4f} ± {r.loss_spread:.4f} "
            f"| {r.drift:.4f} ± {r.drift_spread:.4f} | {r.loss_ratio:.4f} | {r.drift_ratio:.3f} "
            f"| {r.score:.3f} | {r.wins} of {r.runs} |"
        )
    return "\n".join(lines)


def plot_tradeoff(rows: list[Row], path: Path) -> None:
    """Drift against held-out loss, one point a variant; LoRA's points are joined to a curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    lora = sorted((row for row in rows if _is_lora(row)), key=lambda row: row.drift)
    axes.plot([row.drift for row in lora], [row.loss for row in lora], color="0.7", zorder=0)
    for i, row in enumerate(sorted(rows, key=lambda row: row.drift)):
        marker = "s" if _is_lora(row) else "o"
        axes.plot(row.drift, row.loss, marker, color=_color(i), label=row.variant)
    axes.set_xscale("log")
    axes.set_xlabel("drift on class prompts (relative change of the base's prediction)")
    axes.set_ylabel("held-out subject loss, after / before")
    axes.set_title("Lower left is better; squares are LoRA")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=100)


def _color(index: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["tab20"](index % 20 / 20)  # type: ignore[return-value]


def _is_lora(row: Row) -> bool:
    return row.variant.startswith("lora")


def plot_curves(records: list[Record], variants: list[str], path: Path) -> None:
    """Mean held-out loss over training steps, one line a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    for i, variant in enumerate(variants):
        runs = [r for r in records if r.variant == variant and r.curve]
        steps = sorted({step for r in runs for step, _ in r.curve})
        axes.plot(steps, [_mean_at(runs, step) for step in steps], color=_color(i), label=variant)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out subject loss / loss before training")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=100)


def _mean_at(runs: list[Record], step: int) -> float:
    values = [(dict(r.curve).get(step), r.loss_before) for r in runs]
    return mean(loss / before for loss, before in values if loss is not None)
