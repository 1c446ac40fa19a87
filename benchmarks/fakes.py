"""Adapted models that have shapes but no values, for sizes that no small machine holds."""

import torch
from torch import nn

from benchmarks.methods import ADAPTER
from snell_diffusion.diffusion.memory.live import FakeDevice
from snell_diffusion.tuners import SnellaLayer, delta_layers


def make_fake(model: nn.Module, device: FakeDevice) -> None:
    """Take the values of all tensors of a model away, except the levels, which Python code reads.

    Args:
        model: On the meta device; its adapters may have values.
        device: Counts what is done with it.
    """
    model.to("meta")
    for _, layer in delta_layers(model, ADAPTER):
        if isinstance(layer, SnellaLayer):
            level = layer.configs[ADAPTER].init_sparsity
            layer.snella_sparsity[ADAPTER] = torch.tensor(level, dtype=torch.float64)
            layer.snella_threshold[ADAPTER] = torch.tensor(torch.nan)
            layer.reread(ADAPTER)
    device.take(model)
