"""Stand-ins for updates whose memory counts and whose arithmetic does not."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.core.blocks import BlockUpdate, Walk
from snell_diffusion.core.scratch import Scratch
from snell_diffusion.core.select import WHOLE_ENTRIES
from snell_diffusion.tuners import DeltaLayer, delta_layers


def shorten_updates(model: nn.Module, adapter: str) -> None:
    """Take the memory of each update, and skip its arithmetic, in all but two layers of a shape.

    The first and the last are computed as they are; the others take what those take.
    """
    layers: dict[tuple[int, ...], list[DeltaLayer]] = {}
    for _, layer in delta_layers(model, adapter):
        layers.setdefault(layer.weight_shape(), []).append(layer)
    for shape, alike in layers.items():
        for layer in alike[1:-1]:
            heads = getattr(layer.configs[adapter], "heads", 1)
            update = _AnyUpdate((shape[0], math.prod(shape[1:])), 2 * heads + 8)
            layer.delta_fn = partial(_same, update)


def _same(update: BlockUpdate, adapter: str) -> BlockUpdate:
    return update


class _AnyUpdate(BlockUpdate):
    """Takes `floats` per entry of a block, and a whole matrix where a threshold would."""

    statistics = 0

    def __init__(self, shape: tuple[int, int], floats: int) -> None:
        self._shape, self.floats = shape, floats

    def shape(self, params: Sequence[Tensor]) -> tuple[int, int]:
        return self._shape

    def measure(self, params: Sequence[Tensor], scratch: Scratch) -> tuple[tuple[Tensor, ...], Any]:
        if math.prod(self._shape) > WHOLE_ENTRIES:
            return (), None
        whole = scratch.take("whole", self._shape, params[0])
        magnitudes = whole.abs()  # what a threshold is selected from
        del magnitudes
        return (), whole

    def walk(
        self,
        params: Sequence[Tensor],
        statistics: Sequence[Tensor],
        wanted: Sequence[bool],
        scratch: Scratch,
        kept: Any = None,
    ) -> Walk:
        return _AnyWalk(self, params, scratch, kept)


class _AnyWalk(Walk):
    def __init__(
        self, update: _AnyUpdate, params: Sequence[Tensor], scratch: Scratch, kept: Any
    ) -> None:
        self._update, self._params, self._scratch, self.kept = update, params, scratch, kept

    def delta(self, columns: slice) -> Tensor:
        outputs, inputs = self._update.shape(self._params)
        width = len(range(*columns.indices(inputs)))
        floats = 1 if self.kept is not None else self._update.floats
        return self._scratch.take("block", (floats, outputs, width), self._params[0])[0]

    def pull(self, gdelta: Tensor) -> None:
        pass

    def gradients(self) -> list[Tensor | None]:
        return [torch.zeros_like(p) for p in self._params]
