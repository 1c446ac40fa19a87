"""SPT-Adapter: the most sensitive weights one by one, and an adapter where there are many of them.

    y = f(x);   y += scale · (up gelu(down dropout(y) + b) + b_up)          SPT (arXiv:2303.08566)

f is the layer with its single entries. The adapter at the attention's output reads the layer's
input in place of its output. Shape legend: I in features, O out features; down [r, O] (or [r, I]),
b [r], up [O, r], b_up [O]. What is tuned says the config's selection (spt_selection.py); entries
and vectors are in spt_layer.py. Adapters of one layer all read the same f(x).
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
from snell_diffusion.core.sensitivity import adapter_size
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.roles import role_of
from snell_diffusion.tuners.spt_config import SptConfig
from snell_diffusion.tuners.spt_layer import SptLayer, SptModel, SptNorm, names_of

__all__ = [
    "METHOD",
    "SptAdapterConfig",
    "SptAdapterLayer",
    "SptAdapterModel",
    "SptAdapterNormLayer",
]


@dataclass
class SptAdapterConfig(SptConfig):
    """Settings of SPT-Adapter."""

    method: ClassVar[str] = "SPT_ADAPTER"

    def module_size(self, path: str, outputs: int, inputs: int) -> int:
        return adapter_size(self.r, outputs, inputs if reads_input(role_of(path)) else outputs)


class SptAdapterLayer(SptLayer):
    """A Linear with single entries, a bias and an adapter behind it; starts as the base.

    up and both biases start at zero.
    """

    prefix = "spt_adapter_"
    parts = ("down", "down_bias", "up", "up_bias")
    adapter_layer_names = names_of("spt_adapter_", parts)
    other_param_names = (
        *DeltaLayer.other_param_names,
        *("spt_adapter_positions", "spt_adapter_bias_positions"),
    )
    mergeable = False

    def fresh_module(
        self, config: SptConfig, generator: torch.Generator | None
    ) -> tuple[Tensor, ...]:
        O, r = self.out_features, config.r
        width = self.in_features if reads_input(self.role) else O
        bound = 1 / math.sqrt(width)
        down = torch.empty(r, width).uniform_(-bound, bound, generator=generator)
        return down, torch.zeros(r), torch.zeros(O, r), torch.zeros(O)

    def branch(self, x: Tensor, y: Tensor, adapter: str) -> Tensor:
        down, down_bias, up, up_bias = (self.held(name)[adapter] for name in self.parts)
        with no_autocast(x.device):
            read = full(x if reads_input(self.role) else y).to(down.dtype)
            if self.training:
                read = F.dropout(read, self.configs[adapter].dropout)
            return bottleneck(read, down, up, down_bias, up_bias, activation="gelu")

    def merged_parameters(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        raise ValueError(self.why_not_mergeable())

    @torch.no_grad()
    def update_size(self, adapter: str) -> float:
        """Norms of the entries and of the adapter without its GELU, as a matrix of the layer's
        input: up down W0, or up down at the attention's output."""
        with self._onloaded():
            entries = self.change("weight", (adapter,))
            size = 0.0 if entries is None else float(torch.linalg.vector_norm(entries))
            if adapter in self.held("down"):
                down, up = self.held("down")[adapter], self.held("up")[adapter]
                if not reads_input(self.role) and self.writable():
                    down = down @ full(self.get_base_layer().weight).to(down)
                product = float(torch.linalg.vector_norm(up @ down))
                size += abs(self.scaling[adapter]) * product
        return size

    def why_not_mergeable(self) -> str:
        return (
            "SPT-Adapter cannot be merged: its adapters have a GELU, which no weight can hold; use "
            "the adapter unmerged, or SPT-LoRA"
        )


class SptAdapterNormLayer(SptNorm, SptAdapterLayer):
    """A norm with single entries or whole vectors tuned."""


class SptAdapterModel(SptModel):
    """PEFT's model class for SPT-Adapter."""

    prefix = "spt_adapter_"
    tuner_layer_cls = SptAdapterLayer
    conv_layer_cls = SptAdapterLayer
    norm_layer_cls = SptAdapterNormLayer


METHOD = Method(
    name="SPT_ADAPTER",
    config=SptAdapterConfig,
    model=SptAdapterModel,
    summary="SPT-Adapter: the most sensitive single weights, and adapters where there are many",
)


def reads_input(role: str | None) -> bool:
    """Whether a layer's adapter reads the layer's input: at the attention's output."""
    return role == "proj"
