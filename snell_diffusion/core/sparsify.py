"""Keep the largest entries of an update: one magnitude threshold per matrix.

    t = quantile_s(|w|)        linear interpolation between order statistics at position s (N - 1)
    kept: |w| > t, strictly    N - 1 - floor(s (N - 1)) entries when all magnitudes differ

So sparsity 0 still drops the smallest entry, 1 drops everything, entries equal to t are dropped and
a constant matrix is dropped whole. t carries no gradient. SNELL (arXiv:2411.01800) eq. 5 and the
public code of SNELL and SNELLA, which differ; RULES names the readings.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import at_hand, full
from .select import neighbours

Threshold = Tensor | Callable[[Tensor], Tensor]


def kept_count(size: int, sparsity: float) -> int:
    """Entries that survive in a matrix of `size` distinct magnitudes at level `sparsity` (0 to 1).

    Raises:
        ValueError: size is below 1, or sparsity is outside 0 to 1.
    """
    return size - 1 - math.floor(_position(size, sparsity))


def sparsity_for(size: int, keep: int) -> float:
    """The level that keeps exactly `keep` of `size` distinct magnitudes: 1 - keep / size.

    kept_count(size, sparsity_for(size, keep)) == keep for every keep below size. keep == size gives
    level 0, at which the strict comparison still drops the smallest entry.

    Raises:
        ValueError: keep is outside 0 to size.
    """
    if not 0 <= keep <= size:
        raise ValueError(f"keep must be 0 to {size}, the size of the matrix, got {keep}")
    return (size - keep) / size


def threshold(w: Tensor, sparsity: float | Tensor) -> Tensor:
    """Magnitude below or at which an entry is dropped: the quantile of |w| at level `sparsity`.

    Two neighbouring order statistics are selected (no full sort) and interpolated. Works for any
    size, and without a device synchronisation.

    Args:
        w: Update of any shape and float dtype, at least one entry.
        sparsity: Level, 0 to 1. As a 0-d tensor it is sorted for, and compiled code takes it as an
            input: another level is then no reason to compile again.

    Returns:
        0-d tensor in the precision of w (at least float32), detached.
    """
    if isinstance(sparsity, Tensor):
        return _threshold_at(full(w.detach()).abs().flatten(), sparsity)
    position = _position(w.numel(), sparsity)
    rank = math.floor(position)
    low, high = _order_statistics(full(w.detach()).flatten(), rank)
    return torch.lerp(low, high, position - rank)


def _threshold_at(a: Tensor, level: Tensor) -> Tensor:
    """`threshold` of magnitudes [N] at a level that only the device knows."""
    ordered = a.sort().values
    position = level.double() * (len(a) - 1)
    rank = position.long()
    places = torch.stack([rank, (rank + 1).clamp_max(len(a) - 1)])
    low, high = ordered.gather(0, places)
    return torch.lerp(low, high, (position - rank).to(ordered.dtype))


class FirstThreshold:
    """A threshold computed at the first use and then held, for one forward pass and its recompute.

    Pass it to `sparsify` or `update`; `value` is the 0-d tensor, None before the first use.
    """

    def __init__(self, sparsity: float | Tensor) -> None:
        self.sparsity = sparsity
        self.value: Tensor | None = None

    def __call__(self, w: Tensor) -> Tensor:
        if self.value is None:
            self.value = threshold(w, self.sparsity)
        return self.value


def sparsify(
    w: Tensor, sparsity: float, rule: str = "squared", threshold: Threshold | None = None
) -> Tensor:
    """Drop the smallest entries of an update and weigh the others by a rule.

    With a = |w| and m = 1 where a > t, else 0 (t: see `threshold`):

        rule          result                 gradient       source
        squared       w a m                  a m            public code, factor a m constant
        squared_true  w a m                  2 a m          its true derivative
        printed       w max(a - t, 0)        max(a - t, 0)  SNELL eq. 5, factor constant
        printed_true  w max(a - t, 0)        (2a - t) m     its true derivative, t constant
        mask          w m                    m
        soft          sign(w) max(a - t, 0)  m              classical soft threshold
        none          w                      1              KLoRA and MixK; level 0 only

    A matrix that is zero everywhere (identity start) passes the gradient of `mask` and `soft` to
    all entries, else it could never leave zero; `squared` and `printed` are flat there by their
    formula. NaN stays NaN, it is not dropped.

    Args:
        w: Dense update, any shape.
        sparsity: Level, 0 to 1.
        rule: One of RULES.
        threshold: Use this t, or the one this callable returns for w, in place of the quantile.

    Returns:
        Same shape, float32 (float64 for float64 input).

    Raises:
        ValueError: unknown rule, a level outside 0 to 1, or rule `none` with a level above 0.
    """
    check_rule(rule, sparsity)
    w = full(w)
    if rule == "none":
        return w
    t = _resolve(w, sparsity, threshold)
    if torch.compiler.is_compiling():  # the same in plain operations, which a compiler fuses
        delta, factor = _weighed(w.detach(), t, rule)
        return delta + (w - w.detach()) * factor
    sparse: Tensor = _Sparsify.apply(w, t, rule)
    return sparse


def check_rule(rule: str, sparsity: float) -> None:
    """Raises ValueError: an unknown rule, or rule `none` with a level above 0."""
    if rule not in RULES:
        raise ValueError(f"sparsify rule {rule!r} is unknown; known: {', '.join(RULES)}")
    if rule == "none" and sparsity:
        raise ValueError(f"rule 'none' drops nothing, so sparsity must be 0, got {sparsity}")


def _resolve(w: Tensor, sparsity: float, given: Threshold | None) -> Tensor:
    if given is None:
        return threshold(w, sparsity)
    return given(w.detach()) if callable(given) else given


class _Sparsify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, t: Tensor, rule: str) -> Tensor:
        delta, factor = _weighed(w, t, rule)
        ctx.save_for_backward(factor)
        return delta.clone() if delta is w else delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return g * factor, None, None


def _weighed(w: Tensor, t: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    return weigh(w, t, rule, all_zero(w) if rule in LIVE_AT_ZERO else None)


def all_zero(w: Tensor) -> Tensor:
    """0-d tensor: 1 where a whole matrix is zero, else 0, in the dtype of w."""
    return (w.abs().amax() == 0).to(w.dtype)


def weigh(w: Tensor, t: Tensor, rule: str, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A rule of `sparsify` on any part of a matrix: the result and its derivative by w.

    Args:
        w: Entries, float32 or float64, without gradients.
        t: Threshold of the whole matrix, 0-d; or one for each matrix of a stack, [G, 1, 1].
        rule: One of RULES.
        live: For rules in LIVE_AT_ZERO but `none`, `all_zero` of the whole matrix.
    """
    return _RULES[rule](w, t, live)


def _squared(w: Tensor, t: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = _kept(w, t)
    size = kept.abs()
    return kept.mul_(size), size


def _squared_true(w: Tensor, t: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    delta, size = _squared(w, t, None)
    return delta, size.mul_(2)


def _printed(w: Tensor, t: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    over = (w.abs() - t).relu_()
    return w * over, over


def _printed_true(w: Tensor, t: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    delta, over = _printed(w, t, None)
    return delta, over + _above(w, t) * w.abs()


def _mask(w: Tensor, t: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    return _kept(w, t), _alive(w, t, live)


def _soft(w: Tensor, t: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = _above(w, t)
    return (w - w.sign().mul_(t)).mul_(kept), _alive(w, t, live)


def _none(w: Tensor, t: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    return w, torch.ones((), dtype=w.dtype, device=w.device)


def _alive(w: Tensor, t: Tensor, live: Tensor | None) -> Tensor:
    kept = _above(w, t)
    return kept if live is None else kept.add_(live)


def _kept(w: Tensor, t: Tensor) -> Tensor:
    """w where |w| > t, else 0; NaN stays."""
    if at_hand(w) and at_hand(t) and t.numel() == 1:
        return F.hardshrink(w, float(t))  # one pass
    return _above(w, t).mul_(w)


def _above(w: Tensor, t: Tensor) -> Tensor:
    """1 where |w| > t, else 0, in the dtype of w: on CPU several times faster than a bool mask."""
    return w.abs().gt_(t)


_RULES: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "squared": _squared,
    "squared_true": _squared_true,
    "printed": _printed,
    "printed_true": _printed_true,
    "mask": _mask,
    "soft": _soft,
    "none": _none,
}
RULES = tuple(_RULES)
LIVE_AT_ZERO = ("mask", "soft", "none")  # rules whose gradient does not vanish at w = 0


def _position(size: int, sparsity: float) -> float:
    if size < 1:
        raise ValueError(f"a matrix to sparsify needs at least one entry, got {size}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity, the share of zeros, must be 0 to 1, got {sparsity}")
    return float(sparsity) * (size - 1)


def _order_statistics(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The magnitudes of rank `rank` and `rank + 1` (from 0, ascending) of a 1-D tensor. At the last
    rank both are the largest."""
    if at_hand(w):
        low, high = torch.tensor(neighbours(w.numpy(), rank), dtype=w.dtype)
        return low, high
    following = min(rank + 1, w.numel() - 1)
    a = w.abs()
    if w.device.type != "cpu":  # torch counts kthvalue among the non-deterministic on CUDA
        ordered = a.sort().values
        return ordered[rank], ordered[following]
    return a.kthvalue(rank + 1).values, a.kthvalue(following + 1).values
