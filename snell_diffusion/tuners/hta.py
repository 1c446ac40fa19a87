"""HTA: two learned reflections around a learned diagonal, and a few rows beside them.

    ΔW = scale · (H_l Diag(d) H_r + down up)ᵀ,   H = I − c v vᵀ          arXiv:2410.22952

Shape legend: I in features, O out features, b bottleneck; v_l [I], v_r [O], d [min(I, O)],
down [I, b], up [b, O]. The formula is in `snell_diffusion.core.householder`. There is no public
code: what the paper leaves open (the start, rectangular layers, whether v is normalised) is our
reading and said where it is decided.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from snell_diffusion.core import DeltaFn
from snell_diffusion.core.householder import REFLECTIONS, householder_update
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.base import DeltaConfig, check_choice, check_int, config_field
from snell_diffusion.tuners.containers import PreciseParameterDict
from snell_diffusion.tuners.conv import ConvLayer
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.placement import PlacedModel
from snell_diffusion.tuners.registry import Method

__all__ = ["METHOD", "HtaConfig", "HtaConvLayer", "HtaLayer", "HtaModel"]

MOST_ROWS = 4


@dataclass
class HtaConfig(DeltaConfig):
    """Settings of HTA; 5 vectors a square layer at the default bottleneck.

    Raises:
        SnellaConfigError: A value is out of range.
    """

    method: ClassVar[str] = "HTA"
    default_roles: ClassVar[tuple[str, ...] | None] = ("q", "k", "v", "proj")
    fixed: ClassVar[tuple[str, ...]] = ("r",)

    r: int = config_field(DeltaConfig, "r", 1)
    bottleneck: int = field(
        default=1,
        metadata={"help": "columns of down and rows of up beside the reflections, 0 to 4"},
    )
    reflection: str = field(
        default="unit",
        metadata={
            "help": "'literal': I - v v^T, as the paper prints it; 'unit': I - 2 v v^T / |v|^2, "
            "orthogonal whatever v's length"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("bottleneck", self.bottleneck, at_least=0)
        if self.bottleneck > MOST_ROWS:
            raise SnellaConfigError(
                f"bottleneck must be 0 to {MOST_ROWS}, got {self.bottleneck}; for more rows of "
                "that kind use LoRA"
            )
        check_choice("reflection", self.reflection, REFLECTIONS)


class HtaLayer(DeltaLayer):
    """A Linear with HTA updates.

    A fresh update is zero: d and up are, and have gradients, since v_l, v_r and down are random.
    The vectors start with length sqrt 2, where both kinds of reflection are the same.
    """

    adapter_layer_names = ("hta_left", "hta_right", "hta_d", "hta_down", "hta_up")

    hta_left: PreciseParameterDict
    hta_right: PreciseParameterDict
    hta_d: PreciseParameterDict
    hta_down: PreciseParameterDict
    hta_up: PreciseParameterDict

    def add_containers(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, PreciseParameterDict())

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        assert isinstance(config, HtaConfig)
        I, O, b = self.in_features, self.out_features, config.bottleneck
        self.hta_left[adapter] = nn.Parameter(direction(I, generator))
        self.hta_right[adapter] = nn.Parameter(direction(O, generator))
        self.hta_d[adapter] = nn.Parameter(torch.zeros(min(I, O)))
        if b:
            bound = 1 / math.sqrt(I)
            down = torch.empty(I, b).uniform_(-bound, bound, generator=generator)
            self.hta_down[adapter] = nn.Parameter(down)
            self.hta_up[adapter] = nn.Parameter(torch.zeros(b, O))

    def delta_params(self, adapter: str) -> tuple[Tensor, ...]:
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        return tuple(container[adapter] for container in containers if adapter in container)

    def delta_fn(self, adapter: str) -> DeltaFn:
        config = self.configs[adapter]
        assert isinstance(config, HtaConfig)
        reflection = config.reflection

        def update(*params: Tensor) -> Tensor:
            return householder_update(*params, reflection=reflection).T

        return update

    @classmethod
    def norm_bound(cls, config: HtaConfig, tensors: Mapping[str, Tensor]) -> float:
        tensors = {name: tensor.detach().double() for name, tensor in tensors.items()}
        bound = float(tensors["hta_d"].norm())
        if config.reflection == "literal":
            for name in ("hta_left", "hta_right"):
                square = float(tensors[name].square().sum())
                bound *= max(1.0, abs(1.0 - square))
        if "hta_down" in tensors:
            bound += float(tensors["hta_down"].norm() * tensors["hta_up"].norm())
        return abs(config.scale) * bound


class HtaConvLayer(ConvLayer, HtaLayer):
    """A Conv2d with HTA updates of its flattened kernels."""


class HtaModel(PlacedModel):
    """PEFT's model class for HTA."""

    prefix = "hta_"
    tuner_layer_cls = HtaLayer
    conv_layer_cls = HtaConvLayer


METHOD = Method(
    name="HTA",
    config=HtaConfig,
    model=HtaModel,
    summary="two learned Householder reflections around a diagonal, and a few low-rank rows",
)


def direction(size: int, generator: torch.Generator | None) -> Tensor:
    """A random vector of length sqrt 2, [size]: with it I - v v^T is orthogonal."""
    v = torch.randn(size, generator=generator)
    return v * (math.sqrt(2.0) / v.norm().clamp_min(1e-12))
