"""Tables of comparisons: ratios to the reference on the same subject and seed."""

from pathlib import Path

import pytest

from snell_diffusion.evaluation.comparison import Record
from snell_diffusion.evaluation.report import plot_curves, plot_tradeoff, summarize, table


def record(variant: str, subject: str, after: float, drift: float, seed: int = 0) -> Record:
    curve = [(0, 1.0), (10, after)]
    return Record(variant, subject, seed, 1.0, after, drift, 300, 1200, 5.0, curve)


RECORDS = [
    record("lora", "cat", 0.8, 0.2),
    record("lora", "dog", 0.6, 0.1),
    record("ours", "cat", 0.4, 0.1),
    record("ours", "dog", 0.9, 0.05),
]


def test_ratios_are_taken_run_by_run() -> None:
    ours, lora = summarize(RECORDS, "lora")
    assert (ours.variant, lora.variant) == ("ours", "lora")
    assert ours.loss_ratio == pytest.approx((0.5 + 1.5) / 2)
    assert ours.drift_ratio == pytest.approx(0.5)
    assert ours.score == pytest.approx(0.75)
    assert ours.wins == 1
    assert (lora.score, lora.wins) == (1.0, 0)


def test_runs_without_a_twin_in_the_reference_are_left_out() -> None:
    extra = record("ours", "teapot", 0.1, 0.01)
    assert summarize([*RECORDS, extra], "lora")[0].runs == 2
    with pytest.raises(ValueError, match="no record of the reference variant 'dora'"):
        summarize(RECORDS, "dora")


def test_the_table_has_one_line_a_variant() -> None:
    lines = table(summarize(RECORDS, "lora")).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| ours | 2 | 300 | 0.6500 ± 0.3536 | 0.0750 ")
    assert lines[2].endswith("| 1.0000 | 0.500 | 0.750 | 1 of 2 |")


def test_pictures_are_written(tmp_path: Path) -> None:
    plot_tradeoff(summarize(RECORDS, "lora"), tmp_path / "tradeoff.png")
    plot_curves(RECORDS, ["ours", "lora"], tmp_path / "curves.png")
    for name in ("tradeoff.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
