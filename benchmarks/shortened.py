"""Fake models whose layers of one shape need not all go through the arithmetic of their update.

The memory of every layer is taken as it is; operations that were skipped are added again, from one
layer of each shape: an update has as many in every layer, whatever the tokens.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.counting import count
from benchmarks.fakes import make_fake
from benchmarks.methods import ADAPTER, USUAL, Ranks, adapt
from snell_diffusion.diffusion.memory.live import FakeDevice
from snell_diffusion.diffusion.memory.updates import shorten_updates
from snell_diffusion.tuners import delta_layers

_COMPUTED = 2  # layers of each shape that `shorten_updates` leaves as they are
_TOKENS = 8


class _Alike(nn.Module):
    """Linears of one shape side by side."""

    def __init__(self, shape: tuple[int, int], number: int, checkpointing: bool) -> None:
        super().__init__()
        outputs, inputs = shape
        self.linears = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(number))
        self._checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """The sum of all entries of what they give."""
        if not self._checkpointing:
            return torch.stack([linear(x).sum() for linear in self.linears]).sum()
        parts = [checkpoint(linear, x, use_reentrant=False).sum() for linear in self.linears]
        return torch.stack(parts).sum()


def shorten(model: nn.Module, checkpointing: bool, ranks: Ranks = USUAL) -> int:
    """Skip the updates' arithmetic where it only costs time; call it before `make_fake`.

    Args:
        model: Adapted by our method, its first forward pass still to come.
        checkpointing: Whether its layers run again in the backward pass.
        ranks: Columns of the factors.

    Returns:
        The operations of a step that are skipped.
    """
    shapes = [layer.weight_shape() for _, layer in delta_layers(model, ADAPTER)]
    dtype = next(model.parameters()).dtype
    shorten_updates(model, ADAPTER)
    return sum(
        (number - _COMPUTED) * operations(shape, checkpointing, dtype, ranks)
        for shape, number in Counter(_pairs(shapes)).items()
        if number > _COMPUTED
    )


def _pairs(shapes: Iterable[tuple[int, ...]]) -> Iterable[tuple[int, int]]:
    return ((outputs, inputs) for outputs, inputs in shapes)


def operations(
    shape: tuple[int, int], checkpointing: bool, dtype: torch.dtype, ranks: Ranks = USUAL
) -> int:
    """What is skipped of one layer, (O, I): the difference to a step in which it is not."""
    found = []
    for short in (False, True):
        device = FakeDevice()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                model = _Alike(shape, _COMPUTED + 1, checkpointing)
        finally:
            torch.set_default_dtype(before)
        adapt(model, "ours", [f"linears.{i}" for i in range(_COMPUTED + 1)], ranks)
        if short:
            shorten_updates(model, ADAPTER)
        make_fake(model, device)
        with device.counting():
            x = torch.empty(_TOKENS, shape[1], dtype=dtype, requires_grad=True)
        fixed = [*model.parameters(), *model.buffers()]
        counting = device.counting()
        found.append(count(lambda m=model, x=x: m(x), fixed, (x,), counting=counting).flops)
    return found[0] - found[1]
