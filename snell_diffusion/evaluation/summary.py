"""From records to rows: every measure of every method with its interval, and who wins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from snell_diffusion.evaluation.bootstrap import Interval, interval, paired
from snell_diffusion.evaluation.records import Record

Key = tuple[str, int]
"""Subject and seed."""
Read = Callable[[Record], float | None]


@dataclass(frozen=True)
class Measure:
    """A number of a record.

    Attributes:
        name: Short name.
        title: Heading of its column.
        read: Its value in a record; None where it was not measured.
        lower_is_better: Whether less of it is better.
        digits: Decimals shown.
    """

    name: str
    title: str
    read: Read
    lower_is_better: bool
    digits: int = 3


def _score(name: str) -> Read:
    return lambda record: record.scores.get(name, {}).get("value")


def _gain(record: Record) -> float | None:
    return record.gain if math.isfinite(record.gain) else None


LOSS = Measure("loss", "held-out loss, after / before", _gain, True)
DRIFT = Measure("drift", "class drift", lambda record: record.drift, True, 4)
MEASURES = (
    LOSS,
    DRIFT,
    Measure("clip_i", "CLIP-I", _score("clip_i"), False),
    Measure("clip_t", "CLIP-T", _score("clip_t"), False),
    Measure("dino", "DINO", _score("dino"), False),
    Measure("diversity", "diversity", _score("diversity"), False),
)


@dataclass(frozen=True)
class Row:
    """One method over all its runs.

    Attributes:
        method: Its name.
        runs: How many ended well.
        failed: How many diverged.
        rates: Learning rates of the runs.
        trainable: Trained numbers.
        stored_bytes: Median size of what a run leaves.
        peak_bytes: Median of the most memory of a run; None where it was not measured.
        values: Each measure's mean and interval, by name; measures that were taken.
        against: Each measure's paired difference from the reference, by name; runs both have.
        wins: Runs that are better than the reference's in loss, in drift and in both at once.
        pairs: Runs that both have.
    """

    method: str
    runs: int
    failed: int
    rates: tuple[float, ...]
    trainable: int
    stored_bytes: float
    peak_bytes: float | None
    values: dict[str, Interval]
    against: dict[str, Interval]
    wins: tuple[int, int, int]
    pairs: int


def rows(records: Sequence[Record], reference: str) -> list[Row]:
    """One row per method, lowest held-out loss first; methods without a good run come last."""
    methods = dict.fromkeys(record.method for record in records)
    found = [_row(method, records, reference) for method in methods]
    return sorted(found, key=lambda row: row.values[LOSS.name].mean if row.values else math.inf)


def _of(records: Sequence[Record], method: str) -> dict[Key, Record]:
    return {(r.subject, r.seed): r for r in records if r.method == method and not r.failed}


def _row(method: str, records: Sequence[Record], reference: str) -> Row:
    mine, other = _of(records, method), _of(records, reference)
    values, against = {}, {}
    for measure in MEASURES:
        own = points(records, method, measure)
        differences = paired(own, points(records, reference, measure))
        if own:
            values[measure.name] = interval(own)
        if differences and method != reference:
            against[measure.name] = interval(differences)
    good = list(mine.values())
    peaks = [record.peak_bytes for record in good if record.peak_bytes is not None]
    return Row(
        method=method,
        runs=len(good),
        failed=sum(record.method == method and bool(record.failed) for record in records),
        rates=tuple(sorted({record.learning_rate for record in good})),
        trainable=max((record.trainable for record in good), default=0),
        stored_bytes=median(record.stored_bytes for record in good) if good else math.nan,
        peak_bytes=median(peaks) if peaks else None,
        values=values,
        against=against,
        wins=_wins(mine, other),
        pairs=len(mine.keys() & other.keys()),
    )


def points(records: Sequence[Record], method: str, measure: Measure) -> dict[Key, float]:
    """A measure of a method's good runs by subject and seed; nothing where one of them lacks it."""
    found: dict[Key, float] = {}
    for key, record in sorted(_of(records, method).items()):
        value = measure.read(record)
        if value is None:
            return {}
        found[key] = value
    return found


def _wins(mine: dict[Key, Record], other: dict[Key, Record]) -> tuple[int, int, int]:
    shared = mine.keys() & other.keys()
    loss = {key for key in shared if mine[key].gain < other[key].gain}
    drift = {key for key in shared if (mine[key].drift or 0.0) < (other[key].drift or 0.0)}
    return len(loss), len(drift), len(loss & drift)


def frontier(found: Sequence[Row]) -> list[str]:
    """Methods that no other beats in mean held-out loss and mean drift at once, best loss first."""
    points = {
        row.method: (row.values[LOSS.name].mean, row.values[DRIFT.name].mean)
        for row in found
        if {LOSS.name, DRIFT.name} <= row.values.keys()
    }
    return [
        method
        for method, (loss, drift) in sorted(points.items(), key=lambda item: item[1])
        if not any(a <= loss and b <= drift and (a, b) != (loss, drift) for a, b in points.values())
    ]


def mean_curve(records: Sequence[Record], method: str) -> list[tuple[float, float]]:
    """(step, mean held-out loss / loss before training) of a method's runs."""
    found: dict[float, list[float]] = {}
    for record in records:
        if record.method == method and not record.failed and record.loss_before:
            for step, loss in record.curve:
                found.setdefault(step, []).append(loss / record.loss_before)
    return [(step, mean(values)) for step, values in sorted(found.items())]
