"""Confidence intervals of means over groups of runs, by resampling groups and runs in them.

    draw groups with replacement, as many as there are; in each draw runs with replacement;
    take the mean of the groups' means; the interval lies between percentiles of many such draws

Groups are what results are to be generalised over (subjects, tasks), runs what differs by chance
(seeds). Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sec. 13.3 (percentiles).
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL = 4000, 0.95
_SEED = 20_261_121

Points = Mapping[tuple[Hashable, Hashable], float]
"""Values by (group, run), for example by (subject, seed)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: Mean of the groups' means.
        low: Lower end; NaN for a single value, which says nothing of its spread.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside; never where the ends are not known."""
        return value < self.low or value > self.high


def interval(
    points: Points, draws: int = DRAWS, level: float = LEVEL, seed: int = _SEED
) -> Interval:
    """The mean over groups and its percentile interval; the same numbers for the same arguments.

    Args:
        points: Values, at least one.
        draws: How many resamples.
        level: Share of them inside the interval, 0 to 1.
        seed: Of the resampling.

    Raises:
        ValueError: There is no value.
    """
    groups: dict[Hashable, list[float]] = {}
    for (group, _), value in points.items():
        groups.setdefault(group, []).append(value)
    if not groups:
        raise ValueError("an interval needs one value at least")
    values = [np.asarray(runs, float) for runs in groups.values()]
    mean = float(np.mean([runs.mean() for runs in values]))
    if len(points) == 1:
        return Interval(mean, math.nan, math.nan)
    means = _resampled(values, draws, np.random.default_rng(seed)).mean(-1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _resampled(values: list[np.ndarray], draws: int, random: np.random.Generator) -> np.ndarray:
    """Means of resampled groups, [draws, groups]: a group for each place, then runs in it."""
    sizes = np.array([len(runs) for runs in values])
    starts = np.cumsum(sizes) - sizes
    chosen = random.integers(0, len(values), (draws, len(values)))
    size, start = sizes[chosen][..., None], starts[chosen][..., None]
    shares = random.random((*chosen.shape, sizes.max()))
    runs = np.concatenate(values)[start + (shares * size).astype(int)]
    counted = np.arange(sizes.max()) < size
    return np.where(counted, runs, 0.0).sum(-1) / size[..., 0]


def paired(points: Points, reference: Points) -> dict[tuple[Hashable, Hashable], float]:
    """Value minus reference, for the runs that both have."""
    return {key: value - reference[key] for key, value in points.items() if key in reference}


def leaders(methods: Mapping[str, Points], lower_is_better: bool) -> list[str]:
    """The method with the best mean, then those whose paired difference from it may be zero.

    Args:
        methods: Values of each method; methods without any are left out.
        lower_is_better: Whether the best mean is the lowest.
    """
    sign = 1 if lower_is_better else -1
    means = {name: sign * interval(points).mean for name, points in methods.items() if points}
    ranked = sorted(means, key=lambda name: means[name])
    close = []
    for name in ranked[1:]:
        differences = paired(methods[name], methods[ranked[0]])
        if differences and not interval(differences).excludes(0.0):
            close.append(name)
    return [*ranked[:1], *close]
