"""Factors on a layer for the time of one call, taken back without rounding."""

import math
from collections.abc import Iterable

__all__ = ["CallScale"]


class CallScale:
    """A stack of factors that `scale_layer` pushes and `unscale_layer` pops.

    Dividing by a factor would not restore a float exactly, and cannot undo 0.
    """

    def __init__(self) -> None:
        self.factors: list[float] = []
        self._silenced: set[str] = set()

    def product(self) -> float:
        return math.prod(self.factors)

    def push(self, factor: float, adapters: Iterable[str]) -> None:
        """Add a factor; at 0 remember which adapters it silences."""
        if factor != 1:
            self.factors.append(float(factor))
        if factor == 0:
            self._silenced = set(adapters)

    def pop(self, factor: float | None) -> None:
        """Remove one factor of this size, or all of them; a factor that is not there is ignored."""
        if factor is None:
            self.factors.clear()
        elif factor in self.factors:
            self.factors.remove(factor)
        if 0 not in self.factors:
            self._silenced.clear()

    def ends_zero_call(self, adapter: str) -> bool:
        """Whether a weight set for this adapter only means that a call at scale 0 is over.

        diffusers ends such a call by `set_scale(adapter, 1.0)` for each active adapter, which would
        lose the weight the user had given it.
        """
        if adapter not in self._silenced:
            return False
        self._silenced.discard(adapter)
        self.factors = [factor for factor in self.factors if factor != 0]
        return True
