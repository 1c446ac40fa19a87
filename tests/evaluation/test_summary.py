"""Rows of a page: intervals, paired differences, wins, and methods that none beats."""

import math

import pytest

from snell_diffusion.evaluation.records import Record
from snell_diffusion.evaluation.summary import DRIFT, LOSS, frontier, mean_curve, points, rows
from snell_diffusion.evaluation.tuning import at_edge, best_rate, rate_losses
from tests.evaluation.made_up import record, results

RECORDS = [
    record("lora", "cat", 0, 0.8, 0.2),
    record("lora", "dog", 0, 0.6, 0.1),
    record("ours", "cat", 0, 0.4, 0.1),
    record("ours", "dog", 0, 0.9, 0.05),
]


def test_differences_are_paired_and_wins_are_counted() -> None:
    ours, lora = sorted(rows(RECORDS, "lora"), key=lambda row: row.method, reverse=True)
    assert ours.values[LOSS.name].mean == pytest.approx(0.65)
    assert ours.against[LOSS.name].mean == pytest.approx((-0.4 + 0.3) / 2)
    assert ours.against[DRIFT.name].mean == pytest.approx(-0.075)
    assert (ours.wins, ours.pairs) == ((1, 2, 1), 2)
    assert lora.against == {}
    assert lora.wins == (0, 0, 0)


def test_runs_without_a_twin_in_the_reference_are_not_compared() -> None:
    extra = record("ours", "teapot", 0, 0.1, 0.01)
    (ours,) = (row for row in rows([*RECORDS, extra], "lora") if row.method == "ours")
    assert (ours.runs, ours.pairs) == (3, 2)
    assert ours.against[LOSS.name].mean == pytest.approx(-0.05)


def test_a_diverged_run_is_counted_and_left_out() -> None:
    bad = Record("ours", "cat", 1, "d", 1.0, failed="the loss is nan")
    (ours,) = (row for row in rows([*RECORDS, bad], "lora") if row.method == "ours")
    assert (ours.runs, ours.failed) == (2, 1)
    only = rows([*RECORDS, Record("dora", "cat", 0, "d", 1.0, failed="x")], "lora")[-1]
    assert (only.method, only.runs, only.failed) == ("dora", 0, 1)
    assert math.isnan(only.stored_bytes)


def test_a_score_that_one_run_lacks_is_not_averaged() -> None:
    records = [*RECORDS, record("ours", "fox", 0, 0.5, 0.1, scores={})]
    (ours,) = (row for row in rows(records, "lora") if row.method == "ours")
    assert "diversity" not in ours.values
    assert points(records, "ours", LOSS).keys() == {("cat", 0), ("dog", 0), ("fox", 0)}


def test_the_frontier_has_no_method_that_another_beats_in_both() -> None:
    more = [record("bad", s, 0, 0.9, 0.5) for s in ("cat", "dog")]
    more += [record("far", s, 0, 0.1, 0.9) for s in ("cat", "dog")]
    assert frontier(rows([*RECORDS, *more], "lora")) == ["far", "ours"]


def test_the_curve_is_the_mean_of_ratios() -> None:
    half = record("lora", "fox", 0, 0.5, 0.1, loss_before=0.5, curve=[[0, 0.5], [10, 0.1]])
    assert mean_curve([*RECORDS, half], "lora") == [
        (0, 1.0),
        (10, pytest.approx((0.8 + 0.6 + 0.2) / 3)),
    ]


def test_the_best_rate_has_the_lowest_mean_loss() -> None:
    trials = results().trials
    assert rate_losses(trials, "ours") == pytest.approx({0.5: 0.35, 1.0: 0.7, 2.0: 1.4})
    assert best_rate(trials, "ours") == 0.5
    assert at_edge(trials, "ours")
    middle = [*trials, record("ours", "fox", 7, 2.0, 0.1, learning_rate=0.25)]
    assert not at_edge(middle, "ours")


def test_one_diverged_trial_rules_a_rate_out() -> None:
    trials = [
        record("m", "a", 7, 0.1, 0.1, learning_rate=2.0),
        Record("m", "b", 7, "d", 2.0, failed="the loss is nan"),
        record("m", "a", 7, 0.9, 0.1, learning_rate=1.0),
        record("m", "b", 7, 0.9, 0.1, learning_rate=1.0),
    ]
    assert best_rate(trials, "m") == 1.0
    with pytest.raises(ValueError, match="method m has no trial that ended with a finite loss"):
        best_rate(trials[1:2], "m")
    with pytest.raises(ValueError, match="method x has no trial"):
        best_rate(trials, "x")
