"""The choice of each method's learning rate from its trial runs."""

import math
from collections.abc import Iterable
from statistics import mean

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.evaluation.records import Record


def rate_losses(trials: Iterable[Record], method: str) -> dict[float, float]:
    """Mean held-out loss after / before training of a method's trials, by learning rate.

    One diverged trial makes a rate infinitely bad.
    """
    found: dict[float, list[float]] = {}
    for trial in trials:
        if trial.method == method:
            found.setdefault(trial.learning_rate, []).append(trial.gain)
    return {rate: mean(gains) for rate, gains in sorted(found.items())}


def best_rate(trials: Iterable[Record], method: str) -> float:
    """The learning rate with the lowest mean held-out loss; of equal ones the lowest rate.

    Raises:
        SnellaConfigError: The method has no trial, or none ended with a finite loss.
    """
    losses = rate_losses(trials, method)
    if not losses or min(losses.values()) == math.inf:
        raise SnellaConfigError(f"method {method} has no trial that ended with a finite loss")
    return min(losses, key=lambda rate: (losses[rate], rate))


def at_edge(trials: Iterable[Record], method: str) -> bool:
    """Whether the best rate is the lowest or highest tried, so that a better one may lie beyond."""
    trials = list(trials)
    rates = list(rate_losses(trials, method))
    return len(rates) > 1 and best_rate(trials, method) in (rates[0], rates[-1])
