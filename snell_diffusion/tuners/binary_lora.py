"""Bi-LoRA: LoRA whose factors are stored in one bit a number (or 2, 4, 8).

    ΔW = scale · q(up) q(down),   y += scale · q(up) dropout(q(down) x)      arXiv:2307.16867

Shape legend: I in features, O out features; down [r, I], up [O, r]. Trained are float latents; q
(`core.quantize`) maps them to levels in every forward pass, straight through for gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_diffusion.core import DeltaFn
from snell_diffusion.core.precision import no_autocast
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.base import DeltaConfig
from snell_diffusion.tuners.containers import PreciseParameterDict
from snell_diffusion.tuners.conv import ConvLayer
from snell_diffusion.tuners.few_bits import FewBitsConfig, fresh_pair, used
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.placement import PlacedModel
from snell_diffusion.tuners.registry import Method

__all__ = [
    "METHOD",
    "BinaryLoraConfig",
    "BinaryLoraConvLayer",
    "BinaryLoraLayer",
    "BinaryLoraModel",
]


@dataclass
class BinaryLoraConfig(FewBitsConfig):
    """Settings of Bi-LoRA.

    The paper's: r 32 or 1, dropout 0.1, scale by task out of 0.01, 0.1, 1, 10, 100.
    """

    method: ClassVar[str] = "BINARY_LORA"
    default_roles: ClassVar[tuple[str, ...] | None] = ("q", "v")


class BinaryLoraLayer(DeltaLayer):
    """A Linear with Bi-LoRA updates. Dropout drops numbers of the code q(down) x, not inputs."""

    adapter_layer_names = ("binary_lora_down", "binary_lora_up")
    packed_names = adapter_layer_names

    binary_lora_down: PreciseParameterDict
    binary_lora_up: PreciseParameterDict

    def add_containers(self) -> None:
        self.binary_lora_down = PreciseParameterDict()
        self.binary_lora_up = PreciseParameterDict()

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        assert isinstance(config, BinaryLoraConfig)
        down, up = fresh_pair(self.in_features, self.out_features, config, generator)
        self.binary_lora_down[adapter] = nn.Parameter(down)
        self.binary_lora_up[adapter] = nn.Parameter(up)

    def delta_params(self, adapter: str) -> tuple[Tensor, ...]:
        return self.binary_lora_down[adapter], self.binary_lora_up[adapter]

    def delta_fn(self, adapter: str) -> DeltaFn:
        config = self._config(adapter)

        def update(down: Tensor, up: Tensor) -> Tensor:
            return used(up, config) @ used(down, config)

        return update

    @classmethod
    def norm_bound(cls, config: BinaryLoraConfig, tensors: Mapping[str, Tensor]) -> float:
        down, up = (tensors[f"binary_lora_{name}"].detach().double() for name in ("down", "up"))
        return abs(config.scale) * float(used(down, config).norm() * used(up, config).norm())

    def _forward_dropout(
        self, x: Tensor, adapters: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in adapters:
            config = self._config(name)
            down, up = (used(W, config) for W in self.delta_params(name))
            with no_autocast(x.device):
                code = F.dropout(self.code(x.to(down.dtype), down), config.dropout)
                y = y + (self.scaling[name] * self.decoded(code, up)).to(y.dtype)
        return y

    def code(self, x: Tensor, down: Tensor) -> Tensor:
        """q(down) x, [..., r]."""
        return F.linear(x, down)

    def decoded(self, code: Tensor, up: Tensor) -> Tensor:
        """q(up) code, [..., O]."""
        return F.linear(code, up)

    def _config(self, adapter: str) -> BinaryLoraConfig:
        config = self.configs[adapter]
        assert isinstance(config, BinaryLoraConfig)
        return config


class BinaryLoraConvLayer(ConvLayer, BinaryLoraLayer):
    """A Conv2d with Bi-LoRA updates of its flattened kernels.

    Raises:
        SnellaConfigError: Dropout in a convolution of several groups, whose code is none.
    """

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        groups = self.get_base_layer().groups
        if config.dropout and groups > 1:
            raise SnellaConfigError(
                f"Bi-LoRA drops numbers of the code between its factors, which a convolution of "
                f"{groups} groups does not have: set dropout to 0 or leave the layer out of "
                "target_modules"
            )
        super().create_tensors(adapter, config, generator)

    def code(self, x: Tensor, down: Tensor) -> Tensor:
        kernels = down.view(len(down), *self.weight_shape()[1:])
        return self.operation()(x, kernels, None)

    def decoded(self, code: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(code, up[:, :, None, None])


class BinaryLoraModel(PlacedModel):
    """PEFT's model class for Bi-LoRA."""

    prefix = "binary_lora_"
    tuner_layer_cls = BinaryLoraLayer
    conv_layer_cls = BinaryLoraConvLayer


METHOD = Method(
    name="BINARY_LORA",
    config=BinaryLoraConfig,
    model=BinaryLoraModel,
    summary="Bi-LoRA: low-rank factors of 1, 2, 4 or 8 bits, trained straight through",
)
