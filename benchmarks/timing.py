"""Time several works side by side: interleaved rounds in one process, medians, ratios per round.

A shared machine is fast in one minute and slow in the next. Works that take turns meet the same
minutes, so the ratio of two works within a round is steadier than either of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Work = Callable[[], object]
Stopwatch = Callable[[Work], float]
Seconds = dict[str, list[float]]


class Spread(NamedTuple):
    """Median and quartiles of some numbers."""

    low: float
    median: float
    high: float


def cpu_seconds(work: Work) -> float:
    """Seconds that this process computed during one call; with several threads, that passed.

    With one thread they are the same, but for what other programs take of a shared machine.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def wall_seconds(work: Work) -> float:
    """Seconds that passed during one call, for work that waits for files."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cuda_seconds(work: Work) -> float:
    """Seconds between two events on the current CUDA stream, around one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def stopwatch(device: torch.device) -> Stopwatch:
    """What measures work on a device."""
    return cuda_seconds if device.type == "cuda" else cpu_seconds


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    *,
    seconds: Stopwatch = cpu_seconds,
    warmup: int = 1,
    done: Callable[[], object] = lambda: None,
) -> Seconds:
    """Time every work once a round. Each round begins with another work, so none is always first.

    Args:
        works: By name.
        rounds: How many are timed, 1 or more.
        seconds: Measures one call.
        warmup: Rounds before them that are not timed.
        done: Called after every call, also in the warm-up.

    Returns:
        Seconds of every round by name, in the order of the rounds.

    Raises:
        ValueError: No work, or no round.
    """
    if not works or rounds < 1:
        raise ValueError(f"expected works and 1 round or more, got {len(works)} and {rounds}")
    names, found = list(works), {name: [] for name in works}  # type: Sequence[str], Seconds
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in [*names[shift:], *names[:shift]]:
            took = seconds(works[name])
            if turn >= 0:
                found[name].append(took)
            done()
    return found


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of fewer than two values all three are the value itself.

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("a median needs at least one value, got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, middle, high)


def ratio(seconds: Mapping[str, Sequence[float]], over: str, under: str) -> Spread:
    """How much slower one work is than another: the spread of the rounds' ratios.

    Raises:
        KeyError: One of them was not timed.
    """
    return spread([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])
