"""A small adapted model for the tests of the training parts."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from snell_diffusion.tuners import SnellaConfig


class Net(nn.Module):
    """Two Linears, the first with dropout in its adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def adapted(method: str = "snella", seed: int = 0) -> dict[str, nn.Module]:
    """{"net": model} with trainable adapters, in training mode."""
    torch.manual_seed(seed)
    net = Net().requires_grad_(False)
    targets = ["first", "second"]
    config = (
        SnellaConfig(r=4, sparsify="mask", dropout=0.1, target_modules=targets, seed=seed)
        if method == "snella"
        else LoraConfig(r=2, lora_dropout=0.1, target_modules=targets, init_lora_weights=False)
    )
    inject_adapter_in_model(config, net, "default")
    return {"net": net.train()}
