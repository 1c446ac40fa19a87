"""The best adapter measured so far, and whether training is worth going on.

A measurement counts as better if it is lower than the best by more than `min_delta`. After
`patience` measurements in a row that are not, the run ends; what it keeps is the best one either
way.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from snell_diffusion.training.adapter_tensors import (
    Components,
    adapter_copies,
    applied,
)
from snell_diffusion.training.errors import CheckpointError


class BestAdapter:
    """Keeps a copy of the adapter at its lowest held-out loss.

    Args:
        components: Models with adapters, at step 0.
        patience: Measurements without improvement after which a run ends, at least 1.
        min_delta: How much lower a loss must be to count, at least 0.

    Attributes:
        loss: The lowest loss; infinite before the first measurement.
        step: Where it was measured.
        misses: Measurements since then.
        tensors: The adapter there.
    """

    def __init__(self, components: Components, patience: int, min_delta: float) -> None:
        self.components = components
        self.patience, self.min_delta = patience, min_delta
        self.loss, self.step, self.misses = math.inf, 0, 0
        self.tensors = adapter_copies(components)

    @property
    def exhausted(self) -> bool:
        """Whether the run should end."""
        return self.misses >= self.patience

    def observe(self, step: int, loss: float | None) -> bool:
        """Take in a measurement of the adapter as it is in the models now.

        Args:
            step: Optimizer step, 0 or more.
            loss: Held-out loss; None or NaN counts as no improvement.

        Returns:
            Whether it is the best so far.
        """
        if loss is None or not loss < self.loss - self.min_delta:
            self.misses += 1
            return False
        self.loss, self.step, self.misses = loss, step, 0
        self.tensors = adapter_copies(self.components)
        return True

    def applied(self) -> AbstractContextManager[None]:
        """Put the best adapter into the models inside this context; the live values come back."""
        return applied(self.components, self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the tensors are apart. The loss as text, since JSON has no infinity."""
        return {"loss": repr(self.loss), "step": self.step, "misses": self.misses}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict` and the tensors saved with it.

        Raises:
            CheckpointError: The loss is no number, or counts are below 0; nothing was changed.
        """
        try:
            loss = float(state["loss"])
        except ValueError:
            loss = math.nan
        if math.isnan(loss) or state["step"] < 0 or state["misses"] < 0:
            raise CheckpointError(
                f"the saved best measurement is damaged: expected a loss and counts from 0, got "
                f"{dict(state)!r:.200}"
            )
        self.loss, self.step, self.misses = loss, state["step"], state["misses"]
        self.tensors = {k: tensors[k].to(v.device).clone() for k, v in self.tensors.items()}
