"""Layers to try the fused kernels on, and the plain formulas they must agree with."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from snell_diffusion.core import dense, update
from snell_diffusion.core.triton import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
KERNELS = ("mixed", "distance")


@dataclass
class Layers:
    """Factors of G layers: A [G, H, I, q], B [G, H, O, q], signs [G, H], mixers [G] or none."""

    A: Tensor
    B: Tensor
    signs: Tensor
    mixers: tuple[Tensor, ...]

    def group(self, lse: Tensor | None = None) -> ops.Group:
        mixers = self.mixers or (None, None, None)
        return ops.prepare(self.A, self.B, self.signs, *mixers, lse=lse)

    def one(self, g: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """What `update` takes first, for layer g: A, B, signs, mixers."""
        return [t[g].to(dtype) for t in (self.A, self.B, self.signs, *self.mixers)]

    @property
    def kernel(self) -> str:
        return "mixed" if self.mixers else "distance"

    def w(self, g: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """By the plain formula, [O, I]."""
        return dense(*self.one(g, dtype), kernel=self.kernel).T

    def delta(self, g: int, t: Tensor, rule: str) -> tuple[Tensor, list[Tensor]]:
        """By the plain formula in float64, [O, I], and the leaves it was made from."""
        A, B, signs, *mixers = (t.requires_grad_() for t in self.one(g))
        limit = {} if rule == "none" else {"threshold": t.double()}
        made = update(A, B, signs.detach(), *mixers, kernel=self.kernel, rule=rule, **limit)
        return made.T, [A, B, *mixers]


def layers(G: int, H: int, I: int, O: int, q: int, kernel: str, seed: int = 0) -> Layers:
    """Random layers, a little different from each other, heads of alternating sign."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    signs = (0.1 * (-1.0) ** torch.arange(H)).expand(G, H).contiguous()
    mixers = [1.0 + 0.1 * draw(G), 0.5 + 0.05 * draw(G), 0.02 * draw(G)] * (kernel == "mixed")
    made = [0.3 * draw(G, H, I, q), 0.3 * draw(G, H, O, q), signs, *mixers]
    A, B, signs, *rest = (t.to(DEVICE) for t in made)
    return Layers(A, B, signs, tuple(rest))


def values(group: ops.Group) -> Tensor:
    """w as the kernels compute it, [G, O, I]."""
    w = torch.full((group.G, group.size.O, group.size.I), torch.nan, device=group.device)
    ops.write(group, None, 1.0, None, list(w), "none")
    return w


def quantile(w: Tensor, level: float) -> Tensor:
    """The definition: magnitudes sorted, two neighbours interpolated."""
    ordered = w.abs().flatten().sort().values
    position = level * (len(ordered) - 1)
    rank = int(position)
    high = ordered[min(rank + 1, len(ordered) - 1)]
    weight = torch.tensor(position - rank, dtype=torch.float32, device=w.device)
    return torch.lerp(ordered[rank], high, weight)


def cut_at(group: ops.Group, level: float, rule: str) -> tuple[Tensor, Tensor] | None:
    """Thresholds and zero flags by their definition; the search has its own cases."""
    if rule == "none":
        return None
    w = values(group)
    t = torch.stack([quantile(x, level) for x in w])
    return t, (w.flatten(1).count_nonzero(1) == 0).float()


def levels_of(*levels: float) -> Tensor:
    return torch.tensor(levels, dtype=torch.float64).to(DEVICE)
