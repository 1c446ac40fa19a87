"""Competition across layers: how many entries of its update each layer keeps, over training.

    importance   I <- b1 I + (1-b1) P,  U <- b2 U + (1-b2) |P - I|,  P = |p dL/dp|
    score        z_l = mean(I_A U_A) + mean(I_B U_B), divided by its sum over the layers
    budget       K = K1 + (K0 - K1) m^3 from init_sparsity to target_sparsity, m from 1 to 0
    allocation   keep_l in proportion to z_l, at most N_l, together exactly K

SNELLA (arXiv:2510.24037) and its public code. In the public training loops a step is an epoch:
`update(e)` before it, `observe` after every optimizer step with the new parameter and the gradient
that moved it. N_l is the number of entries of layer l, I_l * O_l.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .apportion import apportion
from .precision import at_hand, full
from .sparsify import sparsity_for

METRICS = ("ipt", "mag", "w_mag")
logger = logging.getLogger(__name__)


class Allocator:
    """Divides a shrinking (or growing) budget of kept entries among layers by their importance.

    Args:
        sizes: Entries N_l of each layer's update by name, at least one layer.
        init_sparsity: Share of zeros at the start, 0 to 1.
        target_sparsity: Share of zeros at the end, 0 to 1; may lie below the initial one.
        init_warmup: Up to and including this step levels stay untouched.
        final_warmup: In so many last steps the budget is the target's and every step re-allocates.
        interval: Between the warmups, steps divisible by it re-allocate.
        total: Steps of the schedule.
        beta1, beta2: Decay of the smoothed importance I and of its uncertainty U, 0 to below 1.
        metric: P is |p dL/dp| for "ipt" and |p| for "mag"; "w_mag" scores a layer by the mean
            magnitude of the entries its update keeps, unsmoothed.
        exact: Counts add up to the budget. If false they are truncated as in the public code, which
            loses up to one entry per layer.
        strict: Refuse a schedule whose warmups leave no step between them (it jumps to the target).
            If false that is only logged; the published default 10 + 400 of 100 is such a schedule.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        init_sparsity: float,
        target_sparsity: float,
        init_warmup: int,
        final_warmup: int,
        interval: int,
        total: int,
        beta1: float = 0.85,
        beta2: float = 0.85,
        metric: str = "ipt",
        *,
        exact: bool = True,
        strict: bool = False,
    ) -> None:
        self.sizes = dict(sizes)
        self.init_sparsity, self.target_sparsity = init_sparsity, target_sparsity
        self.init_warmup, self.final_warmup = init_warmup, final_warmup
        self.interval, self.total = interval, total
        self.beta1, self.beta2, self.metric = beta1, beta2, metric
        self.exact = exact
        self._validate(strict)
        self._smoothed: dict[str, Tensor] = {}  # "<I or U>.<A or B>.<layer>", as in state_dict
        # The same I and U one after the other, with the shapes of their parts.
        self._flat: dict[str, Tensor] = {}
        self._layout: list[tuple[str, torch.Size]] = []
        self._magnitudes: dict[str, float] = {}
        self._scores = dict.fromkeys(self.sizes, math.nan)
        self._keep = self._apportion(self._volume(init_sparsity), self.sizes)

    def observe(
        self,
        name: str,
        A: Tensor | None,
        grad_A: Tensor | None,
        B: Tensor | None,
        grad_B: Tensor | None,
        *,
        delta: Tensor | None = None,
    ) -> None:
        """Take one optimizer step of a layer into its importance.

        A layer with any non-finite gradient (a float16 step that overflowed) is skipped for this
        step; a factor without gradient is skipped by itself. No device synchronisation, except for
        "w_mag".

        Args:
            name: Layer, a key of `sizes`.
            A, B: Factors of any shape. The public code passes their values after the step.
            grad_A, grad_B: Their gradients, or None.
            delta: The layer's sparse update, read by metric "w_mag" only.

        Raises:
            KeyError: unknown layer.
            ValueError: metric "w_mag" without delta, or a shape that changed.
        """
        self.observe_all({name: (A, grad_A, B, grad_B)}, {name: delta})

    def observe_all(
        self,
        factors: Mapping[str, tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]],
        deltas: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """`observe` for several layers, A, its gradient, B and its gradient each, in one go.

        A model has hundreds of small factors: laid out one after the other they cost a few calls.
        """
        for name in factors:
            if name not in self.sizes:
                raise KeyError(f"layer {name!r} is unknown; known: {', '.join(self.sizes)}")
        if self.metric == "w_mag":
            for name in factors:
                self._observe_magnitude(name, (deltas or {}).get(name))
            return
        taken: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, (A, grad_A, B, grad_B) in factors.items():
            for side, p, grad in (("A", A, grad_A), ("B", B, grad_B)):
                if p is not None and (grad is not None or self.metric == "mag"):
                    taken[f"{side}.{name}"] = p, grad
        if taken:
            self._smooth(taken)

    def update(self, step: int) -> dict[str, float] | None:
        """Re-allocate at `step` if the schedule says so.

        Returns:
            The sparsity level of every layer, or None where levels stay: inside the initial warmup,
            between intervals, and when no layer has a score above zero (nothing was observed yet).
        """
        if not self.due(step):
            return None
        raw = self._raw_scores()
        total = math.fsum(raw.values())
        if not 0 < total < math.inf:
            return None
        self._scores = {name: z / total for name, z in raw.items()}
        self._keep = self._apportion(self.budget(step), self._scores)
        return {name: sparsity_for(n, self._keep[name]) for name, n in self.sizes.items()}

    def due(self, step: int) -> bool:
        """Whether the schedule says to re-allocate at `step`."""
        if step <= self.init_warmup:
            return False
        return step > self.total - self.final_warmup or step % self.interval == 0

    def budget(self, step: int) -> float:
        """Entries all layers keep together at `step`.

        A whole number between the warmups; inside them the untruncated (1 - s) sum N_l, of which
        `update` allocates the whole part.
        """
        k0, k1 = self._volume(self.init_sparsity), self._volume(self.target_sparsity)
        if step <= self.init_warmup:
            return k0
        if step > self.total - self.final_warmup:
            return k1
        span = self.total - self.final_warmup - self.init_warmup
        m = 1 - (step - self.init_warmup) / span
        return math.trunc(k1 + (k0 - k1) * m**3)

    def scores(self) -> dict[str, float]:
        """Each layer's share of importance at the latest re-allocation; NaN before the first."""
        return dict(self._scores)

    def keep(self) -> dict[str, int]:
        """Entries each layer keeps by the latest allocation, together exactly the whole budget.

        Before the first re-allocation: the initial budget in proportion to the sizes. A layer that
        keeps all N_l is at level 0, where the strict threshold still drops its smallest entry.
        """
        return dict(self._keep)

    def state_dict(self) -> dict[str, int | float | str | Tensor]:
        """Everything `update` depends on, flat: numbers, strings and tensors by dotted key."""
        smoothed = {key: t.clone() for key, t in self._smoothed.items()}
        state: dict[str, int | float | str | Tensor] = {"metric": self.metric, **smoothed}
        for name, size in self.sizes.items():
            state[f"size.{name}"] = size
            state[f"keep.{name}"] = self._keep[name]
            if not math.isnan(self._scores[name]):
                state[f"score.{name}"] = self._scores[name]
        for name, magnitude in self._magnitudes.items():
            state[f"magnitude.{name}"] = magnitude
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; the schedule stays that of the constructor.

        Raises:
            ValueError: the state belongs to other layers, other sizes or another metric.
        """
        sizes = {k.removeprefix("size."): v for k, v in state.items() if k.startswith("size.")}
        if sizes != self.sizes or state.get("metric") != self.metric:
            differing = sorted(n for n in sizes | self.sizes if sizes.get(n) != self.sizes.get(n))
            raise ValueError(
                f"the saved allocator has metric {state.get('metric')!r} and {len(sizes)} layers, "
                f"this one {self.metric!r} and {len(self.sizes)}; they differ in {differing[:5]}"
            )
        self._smoothed = {k: v for k, v in state.items() if k.startswith(("I.", "U."))}
        self._layout = []
        self._keep = {n: int(state[f"keep.{n}"]) for n in self.sizes}
        self._scores = {n: float(state.get(f"score.{n}", math.nan)) for n in self.sizes}
        self._magnitudes = {
            n: float(state[f"magnitude.{n}"]) for n in self.sizes if f"magnitude.{n}" in state
        }

    def _validate(self, strict: bool) -> None:
        if not self.sizes or min(self.sizes.values()) < 1:
            raise ValueError(
                f"sizes needs at least one layer of at least one entry, got {self.sizes}"
            )
        for name in ("init_sparsity", "target_sparsity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 to below 1, got {getattr(self, name)}")
        for name, least in (("init_warmup", 0), ("final_warmup", 0), ("interval", 1), ("total", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is unknown; known: {', '.join(METRICS)}")
        if self.total <= self.init_warmup + self.final_warmup:
            message = (
                f"total must exceed init_warmup + final_warmup, got {self.total} steps for "
                f"{self.init_warmup} + {self.final_warmup}: the budget jumps to its target after "
                f"step {self.init_warmup}"
            )
            if strict:
                raise ValueError(message)
            logger.warning(message)

    def _apportion(self, budget: float, weights: Mapping[str, float]) -> dict[str, int]:
        return apportion(math.floor(budget), self.sizes, weights, self.exact)

    def _volume(self, sparsity: float) -> float:
        return sum((1 - sparsity) * n for n in self.sizes.values())

    def _smooth(self, taken: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Take parameters and gradients by "<A or B>.<layer>" into I and U."""
        shapes = {key: p.shape for key, (p, _) in taken.items()}
        P = self._sensitivities(taken)
        I, U = (self._laid_out(statistic, shapes, P) for statistic in "IU")
        # A sum is the fastest look at all of them; one that overflows costs a second look.
        if at_hand(P) and math.isfinite(float(P.sum())):
            self._advance(I, U, P)
        else:
            finite, new_I, new_U = self._finite(shapes, P), I.clone(), U.clone()
            self._advance(new_I, new_U, P)
            for old, new in ((I, new_I), (U, new_U)):
                old.copy_(torch.where(finite, new, old))
        if self._layout != list(shapes.items()) or self._flat["I"] is not I:
            self._lay_out({"I": I, "U": U}, shapes)

    def _advance(self, I: Tensor, U: Tensor, P: Tensor) -> None:
        I.mul_(self.beta1).add_((1 - self.beta1) * P)
        U.mul_(self.beta2).add_((P - I).abs_().mul_(1 - self.beta2))

    def _lay_out(self, flat: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        """Keep I and U as they lie here, which later steps change in place."""
        for statistic, values in flat.items():
            parts = values.split([shape.numel() for shape in shapes.values()])
            for (key, shape), part in zip(shapes.items(), parts, strict=True):
                self._smoothed[f"{statistic}.{key}"] = part.view(shape)
        self._flat, self._layout = flat, list(shapes.items())

    def _sensitivities(self, taken: Mapping[str, tuple[Tensor, Tensor | None]]) -> Tensor:
        """|parameter x gradient|, or |parameter| for metric "mag", one after the other."""
        p = torch.cat([full(p.detach()).flatten() for p, _ in taken.values()])
        grads = [grad for _, grad in taken.values() if grad is not None]
        if self.metric == "mag" or not grads:
            return p.abs_()
        return p.mul_(torch.cat([full(grad.detach()).flatten() for grad in grads])).abs_()

    def _laid_out(self, statistic: str, shapes: Mapping[str, torch.Size], like: Tensor) -> Tensor:
        """I or U of these factors, one after the other; zero for what is new."""
        if self._layout == list(shapes.items()) and self._flat[statistic].device == like.device:
            return self._flat[statistic]
        parts = []
        for key, shape in shapes.items():
            old = self._smoothed.get(f"{statistic}.{key}", like.new_zeros(shape))
            if old.shape != shape:
                raise ValueError(f"{key} was observed as {list(old.shape)}, now as {list(shape)}")
            parts.append(old.to(like).flatten())
        return torch.cat(parts)

    def _finite(self, shapes: Mapping[str, torch.Size], P: Tensor) -> Tensor:
        """For every entry, whether all of its layer are finite."""
        layers = {key[2:]: None for key in shapes}
        place = {name: i for i, name in enumerate(layers)}
        owners = torch.tensor([place[key[2:]] for key in shapes], device=P.device)
        sizes = torch.tensor([shape.numel() for shape in shapes.values()], device=P.device)
        owner = owners.repeat_interleave(sizes, output_size=len(P))
        broken = torch.zeros(len(layers), dtype=torch.int64, device=P.device)
        broken.index_add_(0, owner, (~P.isfinite()).long())
        return broken[owner] == 0

    def _observe_magnitude(self, name: str, delta: Tensor | None) -> None:
        if delta is None:
            raise ValueError(f"metric 'w_mag' needs the update of layer {name!r}, got delta=None")
        mean = float(delta.detach().double().abs().sum() / max(1, int(delta.count_nonzero())))
        if math.isfinite(mean):
            self._magnitudes[name] = mean

    def _raw_scores(self) -> dict[str, float]:
        if self.metric == "w_mag":
            return {name: self._magnitudes.get(name, 0.0) for name in self.sizes}
        shapes = {k[2:]: t.shape for k, t in self._smoothed.items() if k.startswith("I.")}
        if not shapes:
            return dict.fromkeys(self.sizes, 0.0)
        like = self._smoothed[f"I.{next(iter(shapes))}"]
        I, U = (self._laid_out(statistic, shapes, like) for statistic in "IU")
        sizes = [shape.numel() for shape in shapes.values()]
        if at_hand(I):  # part by part: the products stay in the cache
            pairs = zip(I.split(sizes), U.split(sizes), strict=True)
            sums = [(i.double() * u.double()).sum() for i, u in pairs]
        else:
            sums = [part.sum() for part in (_double(I) * _double(U)).split(sizes)]
        # Read together: one wait for the device in place of one per factor.
        totals = torch.stack(sums).tolist()
        mean = {key: total / n for key, total, n in zip(shapes, totals, sizes, strict=True)}
        return {n: mean.get(f"A.{n}", 0.0) + mean.get(f"B.{n}", 0.0) for n in self.sizes}


def _double(t: Tensor) -> Tensor:
    """float64, on the CPU for devices without it; products of weak signals vanish in float32."""
    return (t.cpu() if t.device.type == "mps" else t).double()
