"""Rounds take turns, and ratios are taken within a round."""

import time

import pytest
import torch

from benchmarks.timing import cpu_seconds, interleaved, ratio, spread, stopwatch, wall_seconds


def test_every_round_runs_every_work_and_begins_with_another_one():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleaved(works, 3, warmup=1)
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]


def test_seconds_are_those_of_the_timed_rounds_in_order():
    clock = iter(range(100))
    found = interleaved({"a": object, "b": object}, 2, seconds=lambda _: next(clock), warmup=1)
    assert found == {"a": [2, 5], "b": [3, 4]}  # 0 and 1 are the warm-up's


def test_every_call_is_told():
    told = []
    interleaved({"a": object, "b": object}, 3, warmup=2, done=lambda: told.append(1))
    assert len(told) == 2 * (3 + 2)


@pytest.mark.parametrize("works, rounds", [({}, 1), ({"a": object}, 0)])
def test_nothing_to_time_is_refused(works, rounds):
    with pytest.raises(ValueError, match=f"got {len(works)} and {rounds}"):
        interleaved(works, rounds)


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one value"):
        spread([])


def test_a_ratio_is_taken_within_each_round():
    # The machine was ten times slower in the second round; the ratio of each round is 2.
    assert ratio({"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]}, "slow", "fast").low == 2.0


def test_rounds_of_different_numbers_are_no_ratio():
    with pytest.raises(ValueError, match="longer"):
        ratio({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


def test_on_a_shared_cpu_only_own_work_is_timed():
    assert stopwatch(torch.device("cpu")) is cpu_seconds
    assert 0 <= cpu_seconds(lambda: None) < 1
    assert cpu_seconds(lambda: time.sleep(0.2)) < 0.1  # what waits is not counted
    assert wall_seconds(lambda: time.sleep(0.2)) >= 0.2
