"""Bootstrap intervals against cases whose answer is known."""

import math

import numpy as np
import pytest

from snell_diffusion.evaluation.bootstrap import Interval, interval, leaders, paired


def test_the_mean_is_that_of_group_means() -> None:
    points = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 10.0}
    assert interval(points).mean == 6.0


def test_percentiles_of_all_resamples_of_two_groups() -> None:
    """Two groups of one run: means 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4."""
    points = {("a", 0): 0.0, ("b", 0): 1.0}
    assert interval(points, level=0.9) == Interval(0.5, 0.0, 1.0)
    assert interval(points, level=0.4) == Interval(0.5, 0.5, 0.5)


def test_runs_inside_a_group_are_drawn_too() -> None:
    """One group of three runs: 27 equally likely resamples, the lowest of them is all zeros."""
    points = {("a", run): float(run) for run in range(3)}
    assert interval(points, draws=20_000, level=1 - 2 / 27 * 0.9) == Interval(1.0, 0.0, 2.0)
    narrow = interval(points, draws=20_000, level=1 - 2 / 27 * 1.5)
    assert narrow.low == pytest.approx(1 / 3)
    assert narrow.high == pytest.approx(5 / 3)


def test_the_width_is_that_of_the_normal_law_for_many_groups() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = interval({(i, 0): v for i, v in enumerate(values)})
    expected = 1.96 * values.std() / math.sqrt(400)
    assert found.mean - found.low == pytest.approx(expected, rel=0.06)
    assert found.high - found.mean == pytest.approx(expected, rel=0.06)


def test_equal_arguments_give_equal_numbers_and_another_seed_others() -> None:
    points = {(i, j): float(i * j) for i in range(4) for j in range(3)}
    assert interval(points) == interval(dict(points))
    assert interval(points, seed=1) != interval(points, seed=2)


def test_a_single_value_has_no_interval_and_excludes_nothing() -> None:
    found = interval({("a", 0): 2.0})
    assert found.mean == 2.0
    assert math.isnan(found.low)
    assert not found.excludes(100.0)
    with pytest.raises(ValueError, match="one value at least"):
        interval({})


def test_differences_are_taken_run_by_run() -> None:
    mine = {("a", 0): 3.0, ("a", 1): 5.0, ("c", 0): 9.0}
    assert paired(mine, {("a", 0): 1.0, ("a", 1): 2.0}) == {("a", 0): 2.0, ("a", 1): 3.0}


def test_leaders_are_told_apart_by_paired_differences() -> None:
    """Groups differ by much, methods by little: only the pairing shows it."""
    groups = [(g, s) for g in range(5) for s in range(3)]
    noise = np.random.default_rng(1).normal(0, 0.01, (2, len(groups)))
    best = {key: 10.0 * key[0] + n for key, n in zip(groups, noise[0], strict=True)}
    same = {key: 10.0 * key[0] + n for key, n in zip(groups, noise[1], strict=True)}
    worse = {key: value + 0.1 for key, value in best.items()}
    assert set(leaders({"a": best, "b": same, "c": worse, "d": {}}, True)) == {"a", "b"}
    assert leaders({"a": best, "b": same, "c": worse}, False) == ["c"]
    assert leaders({}, True) == []
