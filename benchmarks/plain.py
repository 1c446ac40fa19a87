"""SNELLA as the authors' public code computes it: the formulation that the merged path is compared
with. Written from the description of that code, for comparison only.

    d = cdist(A, B);  K = Σ_h c_h d[h];  w = K + alpha softmax_o(K / gamma) + beta      [I, O]
    t = quantile of |w| by a full sort;  ΔW = w ⊙ |w| ⊙ [|w| > t], the factor |w| ⊙ [...] constant
    y = base(x) + x ΔW

Every intermediate is a whole matrix, and the update is a product of its own beside the base's. The
public code computes the branch under activation checkpointing, so its matrices are made again in
the backward pass; `checkpointed=False` keeps them instead.

This is the one place where the update's formula stands a second time: measured against itself, the
package's own could not show what it saves. A test holds both to the same numbers and gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_diffusion.tuners import SnellaConfig, SnellaLayer, delta_layers


def plain_update(
    A: Tensor,
    B: Tensor,
    signs: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta: Tensor,
    sparsity: float,
) -> Tensor:
    """ΔW as [I, O] float32 from float32 factors A [H, I, q] and B [H, O, q]; see the module."""
    K = (signs.view(-1, 1, 1) * torch.cdist(A, B, p=2.0)).sum(0)
    w = K + alpha * torch.softmax(K / gamma, dim=-1) + beta
    a = w.detach().abs()
    return w * (a * (a > sorted_quantile(a, sparsity)))


def sorted_quantile(a: Tensor, level: float) -> Tensor:
    """What `torch.quantile(a, level)` computes, for any size: it refuses large ones."""
    ordered = a.flatten().sort().values
    position = level * (len(ordered) - 1)
    rank = int(position)
    following = ordered[min(rank + 1, len(ordered) - 1)]
    return torch.lerp(ordered[rank], following, position - rank)


class PlainLinear(nn.Module):
    """A frozen Linear and the plain formulation beside it, with the factors of one of our layers.

    Args:
        layer: Freshly adapted by SNELLA with the mixed kernel and the squared rule; shares its
            parameters.
        adapter: Which of its adapters.
        checkpointed: Recompute the branch in the backward pass, as the public code does.

    Raises:
        ValueError: Another kernel, norm or rule.
    """

    def __init__(self, layer: SnellaLayer, adapter: str, checkpointed: bool = True) -> None:
        super().__init__()
        config = layer.configs[adapter]
        assert isinstance(config, SnellaConfig)
        if (config.kernel, config.p, config.sparsify) != ("mixed", 2.0, "squared"):
            raise ValueError(
                "the plain formulation has the kernel 'mixed' with p=2 and the rule 'squared', got "
                f"{config.kernel!r} with p={config.p:g} and {config.sparsify!r}"
            )
        self.base_layer = layer.get_base_layer()
        self.A, self.B = layer.factors(adapter)
        self.alpha = layer.snella_alpha[adapter]
        self.gamma = layer.snella_gamma[adapter]
        self.beta = layer.snella_beta[adapter]
        self.register_buffer("signs", layer.snella_signs[adapter])
        self.sparsity, self.scaling = config.init_sparsity, layer.scaling[adapter]
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.checkpointed and torch.is_grad_enabled():
            branch: Tensor = checkpoint(self._branch, x, use_reentrant=False)
            return y + branch
        return y + self._branch(x)

    def _branch(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            delta = plain_update(
                *(self.A, self.B, self.signs, self.alpha, self.gamma, self.beta, self.sparsity)
            )
            delta = delta if self.scaling == 1.0 else delta * self.scaling
        return x @ delta.to(x.dtype)


def make_plain(model: nn.Module, adapter: str, checkpointed: bool = True) -> None:
    """Put the plain formulation in place of every SNELLA layer of a model."""
    for path, layer in list(delta_layers(model, adapter)):
        if not isinstance(layer, SnellaLayer):
            raise ValueError(f"only SNELLA has a plain formulation, got {type(layer)} at {path}")
        model.set_submodule(path, PlainLinear(layer, adapter, checkpointed))
