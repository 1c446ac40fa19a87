"""What the trainer asks of a family of vision models; the families are beside this file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from snell_diffusion.errors import SnellaBaseError
from snell_diffusion.tuners.roles import endings

HEAD = "classifier"
"""Name of the head in every family: a Linear from features to classes."""


def _itself(config: PretrainedConfig) -> PretrainedConfig:
    return config


def _no_extras(model: nn.Module) -> list[str]:
    return []


def by_depth(blocks: Sequence[Sequence[nn.Module]]) -> list[tuple[nn.Module, float]]:
    """Branches with their depth, of a list of branches for each block."""
    last = max(1, len(blocks) - 1)
    return [(branch, place / last) for place, block in enumerate(blocks) for branch in block]


@dataclass(frozen=True)
class Family:
    """How models of one kind are loaded and adapted.

    Attributes:
        name: For people.
        model_types: `model_type` in their config.json.
        model_class: The class of transformers that classifies.
        roles: What their Linear layers are for, by `tuners.roles`; these are adapted by default.
        interpolates: Whether a forward pass must be told that pictures have another size than the
            one that the base was trained at.
        maps: Whether its Linear layers, the head apart, take maps [B, H, W, C], no tokens.
        classifier_config: The config of the classifying model, of the config that was read.
        branches: Modules whose output (or its first part) is a residual branch, with their depth:
            0 for the first block, 1 for the last.
        extras: Further parameters that published protocols train, for example the class token.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: type[nn.Module]
    roles: tuple[str, ...]
    branches: Callable[[nn.Module], list[tuple[nn.Module, float]]]
    interpolates: bool = False
    maps: bool = False
    classifier_config: Callable[[PretrainedConfig], PretrainedConfig] = _itself
    extras: Callable[[nn.Module], list[str]] = _no_extras

    @property
    def targets(self) -> list[str]:
        """Name endings of the layers that are adapted by default, in every spelling."""
        return endings(self.roles)

    def options(self, model: nn.Module, pixels: Tensor) -> Mapping[str, Any]:
        """What a forward pass needs beside pixels [B, 3, S, S]."""
        if not self.interpolates:
            return {}
        trained = model.config.image_size  # type: ignore[union-attr]
        side = trained if isinstance(trained, int) else trained[0]
        return {"interpolate_pos_encoding": True} if pixels.shape[-1] != side else {}

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Class scores [B, classes] of pixels [B, 3, S, S]."""
        scores: Tensor = model(pixel_values=pixels, **self.options(model, pixels)).logits
        return scores


def image_size(config: PretrainedConfig) -> int:
    """Side in pixels that a model was trained at.

    Raises:
        SnellaBaseError: Its config does not say it, or it is not square.
    """
    size = config.image_size
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise SnellaBaseError(f"the base takes pictures of {size} pixels; they must be square")
    return int(sides.pop())


@torch.no_grad()
def new_head(model: nn.Module, generator: torch.Generator) -> None:
    """Start the head anew: weight truncated normal, std 0.02, bias 0.

    Cut at two in absolute value, which is a hundred deviations: as in timm and the public code.
    """
    head = getattr(model, HEAD)
    weight = torch.empty(head.weight.shape)
    nn.init.trunc_normal_(weight, std=0.02, generator=generator)
    head.weight.copy_(weight)
    head.bias.zero_()
