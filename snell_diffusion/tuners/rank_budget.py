"""AdaLoRA's schedule in our training loop: ranks compete for a budget (arXiv:2303.10512).

The layers, the scores and the masks are PEFT's. PEFT wants its model's own `forward` for the
orthogonality penalty and a call per step for the budget; adapters injected into a model of
diffusers have neither, so both are done here, between the steps.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

__all__ = ["RankBudget"]

_STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankBudget:
    """Calls of `update` before and `observe` after every optimizer step, as `tuners.Competition`.

    Args:
        model: One model with AdaLoRA adapters, or several by component name; each has its budget.
        adapter: Which adapter.
    """

    def __init__(self, model: nn.Module | Mapping[str, nn.Module], adapter: str) -> None:
        models = model if isinstance(model, Mapping) else {"": model}
        self._models = dict(models)
        self._adapter = adapter
        self._configs: dict[str, Any] = {
            name: part.peft_config[adapter]  # type: ignore[index]
            for name, part in self._models.items()
        }
        self._allocators = {
            name: RankAllocator(part, self._configs[name], adapter)
            for name, part in self._models.items()
        }
        self._patterns: dict[str, dict[str, list[bool]]] = {name: {} for name in self._models}
        self._step = 0

    def due(self, step: int) -> bool:
        """Never: masks follow from parameters, which every process has alike."""
        return False

    def digest(self) -> str:
        """SHA-256 in hex over the ranks that are kept."""
        return sha256(repr(sorted(self._patterns.items())).encode()).hexdigest()

    def kept_share(self) -> None:
        """None: ranks are kept or not, no entries."""

    def report(self) -> list[dict[str, Any]]:
        """No rows: no layer has a sparsity level."""
        return []

    def update(self, step: int) -> bool:
        """Start the step's gradients with those of the penalty w · mean |P Pᵀ − 1|_F.

        Backward passes add to gradients that are there. Returns False: no level changes.
        """
        self._step = step + 1
        for name, part in self._models.items():
            factors = [
                p for key, p in part.named_parameters() if f".{self._adapter}" in key and _is(key)
            ]
            weight = self._configs[name].orth_reg_weight
            if not weight or any(p.grad is not None for p in factors):
                continue
            with torch.enable_grad():
                penalty = weight * sum(map(_off_orthogonal, factors)) / len(factors)
            for p, gradient in zip(factors, torch.autograd.grad(penalty, factors), strict=True):
                p.grad = gradient
        return False

    def observe(self) -> None:
        """Take in parameters and gradients after an optimizer step, and mask ranks."""
        for name, part in self._models.items():
            config, allocator = self._configs[name], self._allocators[name]
            last = config.total_step - config.tfinal
            if self._step <= last:
                _, pattern = allocator.update_and_allocate(
                    part, self._step, force_mask=self._step == last
                )
                if pattern:
                    self._patterns[name] = {k: [bool(x) for x in v] for k, v in pattern.items()}
                if self._step == last:
                    allocator.reset_ipt()
            elif self._patterns[name]:
                allocator.mask_using_rank_pattern(part, self._patterns[name])

    def state_dict(self) -> dict[str, Any]:
        """The scores, and which ranks are kept (1 and 0)."""
        state: dict[str, Any] = {"step": self._step}
        for name, allocator in self._allocators.items():
            for kind in _STATISTICS:
                values = getattr(allocator, kind).items()
                state |= {f"{kind}:{name}:{key}": value for key, value in values}
            for key, kept in self._patterns[name].items():
                state[f"kept:{name}:{key}"] = torch.tensor(kept, dtype=torch.float32)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: It belongs to other layers, or its values have another shape or type;
                nothing was changed.
        """
        known = {
            f"{name}:{key}": p.shape
            for name, part in self._models.items()
            for key, p in part.named_parameters()
        }
        for key, value in state.items():
            if key == "step":
                continue
            kind, _, place = key.partition(":")
            if kind not in (*_STATISTICS, "kept") or place not in known:
                raise ValueError(f"saved statistic {key}: expected one of this adapter's layers")
            expected = known[place] if kind != "kept" else known[place][:1]
            if not isinstance(value, Tensor) or value.shape != expected:
                raise ValueError(f"saved statistic {key}: expected a tensor {tuple(expected)}")
        self._step = int(state["step"])
        for key, value in state.items():
            if key == "step":
                continue
            kind, name, place = key.split(":", 2)
            if kind == "kept":
                self._patterns[name][place] = [bool(x) for x in value.tolist()]
            else:
                getattr(self._allocators[name], kind)[place] = value


def _is(key: str) -> bool:
    return "lora_A" in key or "lora_B" in key


def _off_orthogonal(factor: Tensor) -> Tensor:
    """|P Pᵀ − 1|_F of the shorter side of a factor, lora_A (r, I) or lora_B (O, r)."""
    tall = factor.shape[0] > factor.shape[1]
    product = factor.T @ factor if tall else factor @ factor.T
    return torch.linalg.matrix_norm(product - torch.eye(len(product), device=factor.device))
