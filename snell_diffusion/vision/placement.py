"""Dropout and stochastic depth of an adapter's branch, as the public SNELL code places them.

    y = layer(x) + d · (adapted(m·x) − layer(m·x))

m drops numbers of the branch's input: q, k and v of a block share one mask, fc1 and fc2 draw their
own, the output projection drops nothing. d is 0 for a share of the samples and 1 / (1 − share) for
the others, drawn anew for each layer. Both are 1 in eval mode, so merging is exact.

The branch is what the method changes about the layer, whatever the method; for updates that are
added to a weight this is exactly the published branch. It costs two more products of the base.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.training.adapter_tensors import tuner_layers
from snell_diffusion.tuners.roles import block_of, role_of

_SHARED = ("q", "k", "v")
_NOT_DROPPED = ("proj",)


def drop_samples(x: Tensor, share: float) -> Tensor:
    """Stochastic depth: zero a share of the samples of x [B, ...], scale the others to make up."""
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= share
    return x * kept.to(x.dtype) / (1 - share)


class SharedMasks:
    """Dropout masks that layers of one block share while they read the same tensor.

    Args:
        share: Share of numbers dropped, 0 to below 1.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._last: dict[str, tuple[weakref.ref[Tensor], Tensor]] = {}

    def mask(self, x: Tensor, block: str | None) -> Tensor:
        """Factors for x, of its shape; the same as the last for this block if x is the same."""
        if block in self._last and self._last[block][0]() is x:
            return self._last[block][1]
        mask = (torch.rand_like(x) >= self.share).to(x.dtype) / (1 - self.share)
        if block is not None:
            self._last[block] = weakref.ref(x), mask
        return mask


def place_branches(model: nn.Module, dropout: float, drop_path: float) -> None:
    """Give every adapted attention and MLP layer dropout and stochastic depth of its branch.

    Args:
        model: With adapters in it.
        dropout: Share of input numbers dropped, 0 to below 1.
        drop_path: Share of samples dropped, 0 to below 1.
    """
    if not dropout and not drop_path:
        return
    masks = SharedMasks(dropout)
    for path, layer in tuner_layers({"": model}):
        role = role_of(path)
        if role is None:  # a norm, for one
            continue
        shared = block_of(path) if role in _SHARED else None
        masks_of = masks if dropout and role not in _NOT_DROPPED else None
        plain = layer.forward
        layer.forward = partial(_branch, layer, plain, masks_of, shared, drop_path)


def _branch(
    layer: Any,
    plain: Callable[..., Tensor],
    masks: SharedMasks | None,
    block: str | None,
    drop_path: float,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if not layer.training or layer.disable_adapters or layer.merged:
        return plain(x, *args, **kwargs)
    base = layer.base_layer
    y: Tensor = base(x, *args, **kwargs)
    if masks is None:
        effect = plain(x, *args, **kwargs) - y
    else:
        dropped = x * masks.mask(x, block)
        effect = plain(dropped, *args, **kwargs) - base(dropped, *args, **kwargs)
    return y + (drop_samples(effect, drop_path) if drop_path else effect)


def place_backbone(branches: list[tuple[nn.Module, float]], share: float) -> None:
    """Stochastic depth of the base's own residual branches, growing linearly with their depth.

    Args:
        branches: Modules whose output is a branch, with their depth, 0 to 1 (`Family.branches`).
        share: Share of samples dropped in the last block, 0 to below 1.
    """
    for module, depth in branches:
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # what the model came with
        if share * depth > 0:
            module.register_forward_hook(partial(_drop_output, share * depth))


def _drop_output(share: float, module: nn.Module, args: Any, output: Any) -> Any:
    if not module.training:
        return output
    if isinstance(output, tuple):
        return (drop_samples(output[0], share), *output[1:])
    return drop_samples(output, share)
