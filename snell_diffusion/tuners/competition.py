"""Bi-level competition during training: layers for a budget, entries for their layer's share.

Across layers `snell_diffusion.core.Allocator` turns sensitivities into one sparsity level per
layer; inside a layer the level's threshold decides which entries survive.  SNELLA, arXiv:2510.24037
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from snell_diffusion.core import Allocator
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.snella import SnellaConfig, SnellaLayer
from snell_diffusion.tuners.traverse import delta_layers

__all__ = ["Competition"]


class Competition:
    """Watches an adapter's gradients and sets its layers' sparsity levels.

        competition = Competition(unet, "default", config, total_steps=1000)
        for step in range(1000):
            competition.update(step)            # sets the levels of this step
            loss(...).backward()
            optimizer.step()
            competition.observe()               # new parameters, gradients of this step
            optimizer.zero_grad()

    With a gradient scaler call `scaler.unscale_` before the step, as for clipping: scores are
    quadratic in the gradients. A layer whose gradients are missing or not finite is skipped in that
    step.

    Args:
        model: One adapted model, or several by component name; their layers share one budget.
        adapter: Which adapter competes.
        config: Its settings: levels, warmups, interval, smoothing and metric.
        total_steps: Calls of `update` the schedule spans; above both warmups together.

    Raises:
        SnellaConfigError: The rule is 'none', which keeps every entry, or no layer has the adapter.
        ValueError: The schedule does not fit (from `core.Allocator`).
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        adapter: str,
        config: SnellaConfig,
        total_steps: int,
    ) -> None:
        if config.sparsify == "none":
            raise SnellaConfigError(
                "sparsify 'none' keeps every entry, so there is nothing to compete for: "
                "choose another rule or train without the competition"
            )
        self.adapter = adapter
        self.layers = competing_layers(model, adapter)
        self.allocator = Allocator(
            {name: layer.in_features * layer.out_features for name, layer in self.layers.items()},
            config.init_sparsity,
            config.target_sparsity,
            config.alloc_init_warmup,
            config.alloc_final_warmup,
            config.alloc_interval,
            total_steps,
            beta1=config.alloc_beta1,
            beta2=config.alloc_beta2,
            metric=config.alloc_metric,
            strict=True,
        )

    def observe(self) -> None:
        """Read every layer's parameters and gradients, after each optimizer step."""
        factors, deltas = {}, {}
        for name, layer in self.layers.items():
            A, B = layer.factors(self.adapter)
            factors[name] = A.detach(), A.grad, B.detach(), B.grad
            if self.allocator.metric == "w_mag":
                with torch.no_grad():
                    deltas[name] = layer.get_delta_weight(self.adapter)
        self.allocator.observe_all(factors, deltas)

    def due(self, step: int) -> bool:
        """Whether the schedule allocates anew at a step; `update` does, once there are scores."""
        return self.allocator.due(step)

    def digest(self) -> str:
        """SHA-256 in hex over every layer's name and level: equal where the masks' sizes are."""
        levels = [(name, layer.sparsity(self.adapter)) for name, layer in self.layers.items()]
        return hashlib.sha256(repr(levels).encode()).hexdigest()

    def update(self, step: int) -> bool:
        """Set the levels of a step, counted from 0; whether they were allocated anew."""
        levels = self.allocator.update(step)
        if levels is None:
            return False
        for name, level in levels.items():
            self.layers[name].set_sparsity(self.adapter, level)
        return True

    def kept_share(self) -> float:
        """Share of all entries of all layers that they may keep together now."""
        kept, sizes = self.allocator.keep(), self.allocator.sizes
        return sum(kept.values()) / sum(sizes.values())

    def report(self) -> list[dict[str, Any]]:
        """One row per layer in model order, for logs and pictures.

        Rebuilds every update once, so call it when something is logged, not in every step.

        Keys: `name`; `size`, entries of the update; `level`, share of zeros asked for; `budget`,
        entries the layer may keep, which add up to the whole budget; `kept`, entries that survive,
        fewer than the budget only where magnitudes tie or the level is 0 (the smallest is dropped);
        `score`, share of the summed sensitivity, 0.0 before the first allocation; `threshold`, the
        magnitude to exceed.
        """
        scores, budgets = self.allocator.scores(), self.allocator.keep()
        rows = []
        for name, layer in self.layers.items():
            limit, kept = layer.survivors(self.adapter)
            rows.append(
                {
                    "name": name,
                    "size": layer.in_features * layer.out_features,
                    "level": layer.sparsity(self.adapter),
                    "budget": budgets[name],
                    "kept": kept,
                    "score": 0.0 if math.isnan(scores[name]) else scores[name],
                    "threshold": limit,
                }
            )
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The allocator's statistics; the levels are in the layers' own buffers."""
        return self.allocator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: It belongs to other layers, or its values have another shape or type;
                nothing was changed.
        """
        self._require_fitting(state)
        self.allocator.load_state_dict(state)

    def _require_fitting(self, state: dict[str, Any]) -> None:
        shapes: dict[str, torch.Size] = {}
        for name, layer in self.layers.items():
            for side, factor in zip("AB", layer.factors(self.adapter), strict=True):
                shapes |= {f"{kind}.{side}.{name}": factor.shape for kind in "IU"}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape != shapes.get(key):
                raise ValueError(
                    f"saved statistic {key}: expected shape {shapes.get(key)}, got {value.shape}"
                )
            if not isinstance(value, (torch.Tensor, int, float)) and key != "metric":
                raise ValueError(f"saved statistic {key}: expected a number, got {value!r:.80}")


def competing_layers(
    model: nn.Module | Mapping[str, nn.Module], adapter: str
) -> dict[str, SnellaLayer]:
    """SNELLA layers with this adapter by path; of several models, the component's name in front."""
    models = model if isinstance(model, Mapping) else {"": model}
    layers = {
        f"{component}.{path}" if component else path: layer
        for component, module in models.items()
        for path, layer in delta_layers(module, adapter)
        if isinstance(layer, SnellaLayer)
    }
    if not layers:
        raise SnellaConfigError(
            f"no layer has a SNELLA adapter {adapter!r}: add it before the competition starts"
        )
    return layers
