"""Two adapter files for a family, and what their updates do to its denoiser when merged by hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from snell_diffusion.adapters import save_adapter
from snell_diffusion.tuners import delta_layers
from tests.registry.record import TinyFamily, predict
from tests.tiny_models import adapt

Deltas = dict[str, Tensor]  # (O, I) by layer path


@dataclass(frozen=True)
class Made:
    """Adapter "a" is on every Linear of the denoiser, "b" on every third.

    Attributes:
        files: The adapters' folders.
        base: What the denoiser predicts without an adapter.
        deltas: Each adapter's updates, taken from the modules it was made on.
        sparse: The same of "a" with 90 % of every layer's entries dropped.
        known: What `merged` has computed already.
    """

    family: TinyFamily
    files: dict[str, Path]
    base: Tensor
    deltas: dict[str, Deltas]
    sparse: Deltas

    known: dict[tuple[tuple[str, float], ...], Tensor] = field(default_factory=dict)

    def merged(self, weights: Mapping[str, float]) -> Tensor:
        """The prediction of a stock model whose weights are W + Σ weight · ΔW."""
        key = tuple(weights.items())
        if key not in self.known:
            self.known[key] = self._merged(weights)
        return self.known[key]

    def _merged(self, weights: Mapping[str, float]) -> Tensor:
        deltas: Deltas = {}
        for name, weight in weights.items():
            for path, delta in self.deltas[name].items():
                scaled = delta * weight
                deltas[path] = deltas[path] + scaled if path in deltas else scaled
        return predict(self.family, with_weights(self.family, deltas))


def make(family: TinyFamily, folder: Path) -> Made:
    maker = adapt(family.build(), "a", target_modules="all-linear")
    paths = [path for path, _ in delta_layers(maker)]
    other = adapt(family.build(), "b", seed=5, target_modules=paths[::3])
    files = {}
    for name, model in {"a": maker, "b": other}.items():
        files[name] = save_adapter(folder / name, {family.component: model}, name).parent
    deltas = {"a": updates(maker, "a"), "b": updates(other, "b")}
    for _, layer in delta_layers(maker):
        layer.set_sparsity("a", 0.9)
    return Made(
        family=family,
        files=files,
        base=predict(family, family.build()),
        deltas=deltas,
        sparse=updates(maker, "a"),
    )


@torch.no_grad()
def updates(model: nn.Module, adapter: str) -> Deltas:
    return {path: layer.get_delta_weight(adapter) for path, layer in delta_layers(model, adapter)}


@torch.no_grad()
def with_weights(family: TinyFamily, deltas: Deltas) -> nn.Module:
    """A stock model with updates added to its weights."""
    model = family.build()
    for path, delta in deltas.items():
        model.get_submodule(path).weight += delta
    return model
