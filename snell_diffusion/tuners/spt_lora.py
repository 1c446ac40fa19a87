"""SPT-LoRA: the most sensitive weights one by one, and LoRA where there are many of them.

    ΔW = scale · (up down + scatter(v)),  and vectors (biases, norms)      SPT (arXiv:2303.08566)

Shape legend: I in features, O out features; down [r, I], up [O, r]. What is tuned says the config's
selection (spt_selection.py); entries and vectors are in spt_layer.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from snell_diffusion.core.bottleneck import bottleneck
from snell_diffusion.core.precision import full, no_autocast
from snell_diffusion.core.sensitivity import lora_size
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.spt_config import SptConfig
from snell_diffusion.tuners.spt_layer import SptLayer, SptModel, SptNorm, names_of

__all__ = ["METHOD", "SptLoraConfig", "SptLoraLayer", "SptLoraModel", "SptLoraNormLayer"]


@dataclass
class SptLoraConfig(SptConfig):
    """Settings of SPT-LoRA."""

    method: ClassVar[str] = "SPT_LORA"

    def module_size(self, path: str, outputs: int, inputs: int) -> int:
        return lora_size(self.r, outputs, inputs)


class SptLoraLayer(SptLayer):
    """A Linear with single entries, a bias and a LoRA; starts as the base.

    up starts at zero, as the paper intends; the public code's global start overwrites it. Dropout
    drops inputs of the LoRA, except at the attention's output.
    """

    prefix = "spt_lora_"
    parts = ("down", "up")
    adapter_layer_names = names_of("spt_lora_", parts)
    other_param_names = (
        *DeltaLayer.other_param_names,
        *("spt_lora_positions", "spt_lora_bias_positions"),
    )

    def fresh_module(
        self, config: SptConfig, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        bound = 1 / math.sqrt(self.in_features)
        down = torch.empty(config.r, self.in_features)
        return down.uniform_(-bound, bound, generator=generator), torch.zeros(
            self.out_features, config.r
        )

    def branch(self, x: Tensor, y: Tensor, adapter: str) -> Tensor:
        down, up = self.held("down")[adapter], self.held("up")[adapter]
        with no_autocast(x.device):
            x = full(x).to(down.dtype)
            if self.training and self.role != "proj":
                x = F.dropout(x, self.configs[adapter].dropout)
            return bottleneck(x, down, up)

    def merged_parameters(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        merged = super().merged_parameters(adapters)
        owners = [name for name in adapters if name in self.held("down")]
        if owners:
            weight = merged.get("weight", full(self.get_base_layer().weight))
            for name in owners:
                product = self.held("up")[name] @ self.held("down")[name]
                weight = weight + self.scaling[name] * product
            merged["weight"] = weight
        return merged


class SptLoraNormLayer(SptNorm, SptLoraLayer):
    """A norm with single entries or whole vectors tuned."""


class SptLoraModel(SptModel):
    """PEFT's model class for SPT-LoRA."""

    prefix = "spt_lora_"
    tuner_layer_cls = SptLoraLayer
    conv_layer_cls = SptLoraLayer
    norm_layer_cls = SptLoraNormLayer


METHOD = Method(
    name="SPT_LORA",
    config=SptLoraConfig,
    model=SptLoraModel,
    summary="SPT-LoRA: the most sensitive single weights, and LoRA where there are many of them",
)
