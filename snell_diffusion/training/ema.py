"""Exponential moving average of an adapter, with its sparsity levels.

    shadow <- d shadow + (1 - d) value,   d = min(decay, (1 + step) / (10 + step)), or decay

Buffers (levels, thresholds) are copied, not averaged: an averaged adapter at another level than
the live one would be a different model.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from snell_diffusion.training.adapter_tensors import (
    Components,
    adapter_copies,
    adapter_tensors,
    applied,
)


class AdapterEma:
    """Average of the adapter tensors of `components`.

    Args:
        components: Models with adapters.
        decay: Weight of the past, 0 to below 1.
        warm: Whether it is smaller in the first steps (see above); the public SNELLA code has the
            decay itself from the first step on.
    """

    def __init__(self, components: Components, decay: float, warm: bool = True) -> None:
        self.components = components
        self.warm = warm
        self.decay = decay
        self.shadow = adapter_copies(components)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the live values after optimizer step `step`, 1 or more."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm else self.decay
        for name, value in adapter_tensors(self.components).items():
            if isinstance(value, nn.Parameter) and value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Restore the average from a checkpoint's tensors."""
        self.shadow = {k: shadow[k].to(v.device).clone() for k, v in self.shadow.items()}

    def applied(self) -> AbstractContextManager[None]:
        """Put the average into the models inside this context; the live values come back."""
        return applied(self.components, self.shadow)
