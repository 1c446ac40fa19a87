"""Divide a whole number of entries among layers of limited size, in proportion to weights."""

import math
from collections.abc import Mapping
from fractions import Fraction


def apportion(
    total: int, sizes: Mapping[str, int], weights: Mapping[str, float], exact: bool = True
) -> dict[str, int]:
    """Divide `total` entries among layers in proportion to their weights, none above its size.

    What a full layer cannot take goes to the layers with room, again in proportion to their
    weights, or evenly if these are all zero. Whole numbers by largest remainder, ties by name; the
    arithmetic is rational, so the result adds up to `total` and is the same in any layer order.

    Args:
        total: Entries to divide, at least 0; more than all sizes together fills every layer.
        sizes: Capacity of each layer.
        weights: Finite weight of each layer, at least 0.
        exact: If false, shares are truncated and up to one entry per layer is lost, as in the
            public code of SNELLA.

    Returns:
        Entries per layer, in the order of `sizes`.
    """
    total = min(total, sum(sizes.values()))
    share = dict.fromkeys(sizes, Fraction(0))
    positive = {name: Fraction(weights[name]) for name in sizes if weights[name] > 0}
    rest = _fill(share, total, sizes, positive)
    _fill(share, rest, sizes, {name: Fraction(1) for name in sizes if name not in positive})
    keep = {name: math.floor(s) for name, s in share.items()}
    if exact:
        by_remainder = sorted(sizes, key=lambda name: (keep[name] - share[name], name))
        for name in by_remainder[: total - sum(keep.values())]:
            keep[name] += 1
    return keep


def _fill(
    share: dict[str, Fraction], rest: int, sizes: Mapping[str, int], weight: dict[str, Fraction]
) -> int:
    """Fill `share` in proportion to positive weights; returns what found no room."""
    open_weight = sum(weight.values(), Fraction(0))
    by_fullness = sorted(weight, key=lambda name: (sizes[name] / weight[name], name))
    for position, name in enumerate(by_fullness):
        if rest * weight[name] < sizes[name] * open_weight:
            with_room = by_fullness[position:]
            share.update({n: rest * weight[n] / open_weight for n in with_room})
            return 0
        share[name] = Fraction(sizes[name])
        rest -= sizes[name]
        open_weight -= weight[name]
    return rest
