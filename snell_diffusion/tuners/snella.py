"""SNELLA: kernelized, sparse high-rank updates whose layers compete for what may survive.

    ΔW = scale · sparsify(K + alpha·softmax(K / gamma) + beta, level)ᵀ
    K[i, o] = Σ_h c_h |A[h, i] − B[h, o]|_p,   c_h = 0.1 · (−1)^h       arXiv:2510.24037, 2411.01800

Shape legend: I in features, O out features, H heads, q = r / H; A [H, I, q], B [H, O, q].
The formula itself is `snell_diffusion.core.update`; this file holds its settings and parameters.
Where paper and public code differ, `SnellaConfig.paper` follows the code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snell_diffusion.core import KERNELS, LIVE_AT_ZERO, METRICS, RULES, dense, threshold, update
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.base import (
    DeltaConfig,
    DeltaModel,
    check_bool,
    check_choice,
    check_int,
    check_number,
)
from snell_diffusion.tuners.containers import PreciseBufferDict, PreciseParameterDict
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.registry import Method

__all__ = ["DIFFUSION", "INITS", "METHOD", "SnellaConfig", "SnellaLayer", "SnellaModel"]

INITS = ("paper", "identity")
SIGN = 0.1


@dataclass
class SnellaConfig(DeltaConfig):
    """Settings of SNELLA; start from `SnellaConfig.paper()` or `SnellaConfig.diffusion()`.

    A fresh adapter moves no weight by more than `max_fresh_update`: 0 with init "identity"; with
    init "paper" and the squared rule at most 7.3e-5 in a 768x768 layer (measured: 1.9e-5), against
    weights of about 2e-2.
    """

    method: ClassVar[str] = "SNELLA"

    heads: int = field(default=2, metadata={"help": "kernels of alternating sign; must divide r"})
    kernel: str = field(
        default="mixed",
        metadata={
            "help": "'mixed': distances, their softmax and a constant (SNELLA); 'distance': "
            "distances alone (SNELL); 'linear': inner products, as in LoRA"
        },
    )
    p: float = field(
        default=2.0, metadata={"help": "norm of the distances, 1 or more; 2 is Euclidean"}
    )
    sparsify: str = field(
        default="squared",
        metadata={
            "help": "what becomes of an entry w above the threshold t: 'squared' w|w| (public "
            "code), 'printed' w(|w|-t) (SNELL's equation), 'mask' w, 'soft' sign(w)(|w|-t); "
            "'squared_true' and 'printed_true' have the true derivatives; 'none' keeps every entry"
        },
    )
    init_sparsity: float = field(
        default=0.0,
        metadata={
            "help": "share of zeros at the start, 0 up to but not 1; the level of every layer"
        },
    )
    target_sparsity: float = field(
        default=0.5,
        metadata={
            "help": "share of zeros in all layers together when the competition ends, 0 up to not 1"
        },
    )
    init: str = field(
        default="paper",
        metadata={
            "help": "'paper': A and B uniform within 1/sqrt(features * r/heads), so a small update "
            "from the start; 'identity': exactly no update at the start, but live gradients"
        },
    )
    init_scale: float = field(
        default=1.0, metadata={"help": "factor on the range A and B are drawn from, above 0"}
    )
    train_alpha: bool = field(
        default=True, metadata={"help": "train the softmax term's weight (kernel 'mixed')"}
    )
    train_gamma: bool = field(
        default=True, metadata={"help": "train the softmax term's temperature (kernel 'mixed')"}
    )
    train_beta: bool = field(
        default=True, metadata={"help": "train the constant term (kernel 'mixed')"}
    )
    alloc_init_warmup: int = field(
        default=0, metadata={"help": "steps before the competition starts, 0 or more"}
    )
    alloc_final_warmup: int = field(
        default=0, metadata={"help": "last steps, at the target sparsity, 0 or more"}
    )
    alloc_interval: int = field(
        default=1, metadata={"help": "steps between two allocations, 1 or more"}
    )
    alloc_beta1: float = field(
        default=0.85, metadata={"help": "smoothing of the sensitivities, 0 up to but not 1"}
    )
    alloc_beta2: float = field(
        default=0.85, metadata={"help": "smoothing of their uncertainty, 0 up to but not 1"}
    )
    alloc_metric: str = field(
        default="ipt",
        metadata={
            "help": "what layers are scored by: 'ipt' |parameter * gradient|, 'mag' |parameter|, "
            "'w_mag' mean size of the update's kept entries"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("heads", self.heads, at_least=1)
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("sparsify", self.sparsify, RULES)
        check_choice("init", self.init, INITS)
        check_choice("alloc_metric", self.alloc_metric, METRICS)
        check_number("p", self.p, "1 or more", lambda p: p >= 1)
        check_number("init_scale", self.init_scale, "above 0", lambda scale: scale > 0)
        for name in ("init_sparsity", "target_sparsity", "alloc_beta1", "alloc_beta2"):
            check_number(name, getattr(self, name), "0 or more and below 1", lambda s: 0 <= s < 1)
        for name in ("train_alpha", "train_gamma", "train_beta"):
            check_bool(name, getattr(self, name))
        for name in ("alloc_init_warmup", "alloc_final_warmup"):
            check_int(name, getattr(self, name), at_least=0)
        check_int("alloc_interval", self.alloc_interval, at_least=1)
        self._check_together()

    def _check_together(self) -> None:
        if self.r % self.heads:
            below = self.r - self.r % self.heads
            raise SnellaConfigError(
                f"r must be divisible by heads: r={self.r} with heads={self.heads} would silently "
                f"use {below} numbers per feature; set r to {below or self.heads} or "
                f"{below + self.heads}"
            )
        if self.sparsify == "none" and self.init_sparsity:
            raise SnellaConfigError(
                f"sparsify 'none' keeps every entry: init_sparsity must be 0, got "
                f"{self.init_sparsity}"
            )
        if self.kernel == "linear" and self.p != 2.0:
            raise SnellaConfigError(f"kernel 'linear' has no distances: leave p at 2, got {self.p}")
        if self.init == "identity":
            self._check_identity()

    def _check_identity(self) -> None:
        if self.sparsify not in LIVE_AT_ZERO:
            raise SnellaConfigError(
                f"init 'identity' needs a rule with a gradient at zero: {', '.join(LIVE_AT_ZERO)}; "
                f"sparsify {self.sparsify!r} multiplies the gradient by the update, so it would "
                "stay zero for ever"
            )
        if self.kernel != "linear" and self.heads % 2:
            raise SnellaConfigError(
                "init 'identity' starts from pairs of equal heads of opposite sign: heads must be "
                f"even with kernel {self.kernel!r}, got {self.heads}"
            )
        if self.kernel == "mixed" and not self.train_alpha:
            raise SnellaConfigError(
                "init 'identity' starts alpha at 0, so with train_alpha=False the softmax term "
                "would never act: use kernel 'distance' or train alpha"
            )

    @classmethod
    def paper(cls, **changes: Any) -> "SnellaConfig":
        """The settings of the public SNELLA code; `changes` are any other fields."""
        return cls(**changes)

    @classmethod
    def diffusion(cls, **changes: Any) -> "SnellaConfig":
        """Our setting for diffusion models; `changes` win over it."""
        return cls(**{**DIFFUSION, **changes})

    @property
    def q(self) -> int:
        """Numbers per feature and head."""
        return self.r // self.heads

    def init_bounds(self, in_features: int, out_features: int) -> tuple[float, float]:
        """Half-widths of the uniform distributions A and B start from."""
        return (
            self.init_scale / math.sqrt(in_features * self.q),
            self.init_scale / math.sqrt(out_features * self.q),
        )

    def max_fresh_update(self, in_features: int, out_features: int) -> float:
        """An upper bound on any entry of a fresh adapter's |ΔW| in a layer, proven, not measured.

        Distances of fresh factors lie between 0 and D, the diameter of their boxes, so |K| <= M
        with M = 0.1 · ceil(H/2) · D, and softmax(K) <= e^(2M) / O. No rule enlarges |w|, except
        that 'squared' and 'printed' give at most |w|².
        """
        if self.init == "identity":
            return 0.0
        a, b = self.init_bounds(in_features, out_features)
        if self.kernel == "linear":
            largest = SIGN * self.r * a * b
        else:
            pairs = math.ceil(self.heads / 2)
            largest = SIGN * pairs * (a + b) * self.q ** (1 / self.p)
        if self.kernel == "mixed":
            largest += math.exp(2 * largest) / out_features
        if self.sparsify not in LIVE_AT_ZERO:
            largest **= 2
        return abs(self.scale) * largest


DIFFUSION: dict[str, Any] = {
    "kernel": "mixed",
    "sparsify": "mask",
    "init": "identity",
    "train_beta": False,
}
"""What `SnellaConfig.diffusion` changes: the one place to edit when experiments find better."""


@dataclass(frozen=True)
class Level:
    """A sparsity level as Python numbers, with what they were read from."""

    value: float
    stored: bool  # whether a threshold is stored, to use in place of the level's quantile
    buffers: tuple[Tensor, Tensor]
    versions: tuple[int, int] | None

    @classmethod
    def read(cls, sparsity: Tensor, limit: Tensor) -> "Level":
        """Waits for the device, twice."""
        return cls(
            float(sparsity),
            not math.isnan(float(limit)),
            (sparsity, limit),
            versions(sparsity, limit),
        )

    def fits(self, sparsity: Tensor, limit: Tensor) -> bool:
        same = self.buffers[0] is sparsity and self.buffers[1] is limit
        return same and self.versions is not None and self.versions == versions(sparsity, limit)


def versions(sparsity: Tensor, limit: Tensor) -> tuple[int, int] | None:
    """Torch's counters of changes in place; None for inference tensors, which count none."""
    if sparsity.is_inference() or limit.is_inference():
        return None
    return sparsity._version, limit._version


class SnellaLayer(DeltaLayer):
    """A Linear with SNELLA updates.

    Init "identity" sets the heads of each pair equal, A[2k] = A[2k+1] and B[2k] = B[2k+1], so their
    opposite signs cancel exactly while their gradients are opposite and alive; alpha and beta start
    at 0. Kernel "linear" starts B at 0 instead, so A's own gradient comes alive with the first
    step, as in LoRA. Either way the file holds A and B and nothing about the start.

    Buffers, saved with the adapter: `snella_signs` [H]; `snella_sparsity`, float64, the share of
    zeros; `snella_threshold`, float32, the magnitude to use in its place, or NaN to compute it from
    the level. A stored threshold makes the mask the same on every device; the first differentiated
    forward in training mode drops it, since it belongs to the factors it was computed from.
    """

    adapter_layer_names = ("snella_A", "snella_B", "snella_alpha", "snella_gamma", "snella_beta")
    other_param_names = (
        *DeltaLayer.other_param_names,
        *("snella_signs", "snella_sparsity", "snella_threshold", "_levels"),
    )

    snella_A: PreciseParameterDict
    snella_B: PreciseParameterDict
    snella_alpha: PreciseParameterDict
    snella_gamma: PreciseParameterDict
    snella_beta: PreciseParameterDict

    def add_containers(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, PreciseParameterDict())
        self.snella_signs = PreciseBufferDict()
        self.snella_sparsity = PreciseBufferDict()
        self.snella_threshold = PreciseBufferDict()
        self._levels: dict[str, Level] = {}

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        assert isinstance(config, SnellaConfig)
        A, B = fresh_factors(config, self.in_features, self.out_features, generator)
        self.snella_A[adapter] = nn.Parameter(A)
        self.snella_B[adapter] = nn.Parameter(B)
        if config.kernel == "mixed":
            alpha = 0.0 if config.init == "identity" else 1.0
            self.snella_alpha[adapter] = nn.Parameter(torch.tensor([alpha]))
            self.snella_gamma[adapter] = nn.Parameter(torch.ones(1))
            self.snella_beta[adapter] = nn.Parameter(torch.zeros(1))
        self.frozen_peft_weight_names[adapter] = tuple(
            f"snella_{name}"
            for name in ("alpha", "gamma", "beta")
            if not getattr(config, f"train_{name}")
        )
        heads = torch.arange(config.heads)
        self.snella_signs[adapter] = SIGN * (1.0 - 2.0 * (heads % 2))
        self.snella_sparsity[adapter] = torch.tensor(config.init_sparsity, dtype=torch.float64)
        self.snella_threshold[adapter] = torch.tensor(math.nan, dtype=torch.float32)

    def delta_params(self, adapter: str) -> tuple[Tensor, ...]:
        return tuple(
            container[adapter]
            for container in (getattr(self, name) for name in self.adapter_layer_names)
            if adapter in container
        )

    def delta_state(self, adapter: str) -> tuple[Tensor, ...]:
        return (
            self.snella_signs[adapter],
            self.snella_sparsity[adapter],
            self.snella_threshold[adapter],
        )

    def delta_fn(self, adapter: str) -> Callable[..., Tensor]:
        config, signs, level = (
            self._require(adapter),
            self.snella_signs[adapter],
            self._level(adapter),
        )
        limit = self.snella_threshold[adapter] if level.stored else None

        def fn(
            A: Tensor,
            B: Tensor,
            alpha: Tensor | None = None,
            gamma: Tensor | None = None,
            beta: Tensor | None = None,
        ) -> Tensor:
            return update(
                *(A, B, signs, alpha, gamma, beta),
                sparsity=level.value,
                kernel=config.kernel,
                p=config.p,
                rule=config.sparsify,
                threshold=limit,
            ).T

        return fn

    def on_training_forward(self, adapter: str) -> None:
        if self._level(adapter).stored:
            self._set_threshold(adapter, math.nan)

    # Sparsity

    def set_sparsity(self, adapter: str, level: float) -> None:
        """Set the share of zeros in this layer's update, 0 (dense) to 1 (no update at all).

        Raises:
            ValueError: Unknown adapter, a level out of range, or one above 0 with rule 'none'.
        """
        rule = self._require(adapter).sparsify
        if not 0.0 <= level <= 1.0 or (rule == "none" and level > 0):
            raise ValueError(
                f"sparsity must be 0 (dense) to 1, and 0 with rule 'none'; got {level} for "
                f"adapter {adapter!r} with rule {rule!r}"
            )
        with torch.no_grad():
            self.snella_sparsity[adapter].fill_(level)
        self._set_threshold(adapter, math.nan)

    def sparsity(self, adapter: str) -> float:
        """The level now: share of zeros asked for, 0 to 1."""
        self._require(adapter)
        return self._level(adapter).value

    def current_threshold(self, adapter: str) -> float:
        """The magnitude that entries must exceed now: the stored one, or the level's quantile."""
        return self.survivors(adapter)[0]

    def kept(self, adapter: str) -> int:
        """How many entries of the update survive now, counted."""
        return self.survivors(adapter)[1]

    def survivors(self, adapter: str) -> tuple[float, int]:
        """Threshold and count of surviving entries, from one evaluation of the update.

        With rule 'none' the threshold is 0.0 and every entry counts.
        """
        if self._require(adapter).sparsify == "none":
            return 0.0, self.in_features * self.out_features
        w, level = self.dense(adapter), self._level(adapter)
        limit = self.snella_threshold[adapter] if level.stored else threshold(w, level.value)
        return float(limit), int((w.abs() > limit).sum())

    def store_threshold(self, adapter: str) -> float:
        """Keep the threshold of this moment, so that the mask is the same wherever it is loaded."""
        self._set_threshold(adapter, self.current_threshold(adapter))
        return float(self.snella_threshold[adapter])

    def dense(self, adapter: str) -> Tensor:
        """The update before sparsify and scale, w [I, O], without gradients."""
        config = self._require(adapter)
        with torch.no_grad(), self._onloaded():
            A, B, *mixers = self.delta_params(adapter)
            signs = self.snella_signs[adapter]
            return dense(A, B, signs, *mixers, kernel=config.kernel, p=config.p)

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [H, I, q] and B [H, O, q]: what the competition reads."""
        return self.snella_A[adapter], self.snella_B[adapter]

    def train(self, mode: bool = True) -> "SnellaLayer":
        super().train(mode)
        # Compiled code reads the remembered levels; a switch of mode brings them up to date.
        for adapter in self.configs:
            self._level(adapter)
        return self

    def _set_threshold(self, adapter: str, value: float) -> None:
        with torch.no_grad():
            self.snella_threshold[adapter].fill_(value)
        self._level(adapter)

    def _level(self, adapter: str) -> Level:
        """The level, read from the device only after its buffers changed."""
        known = self._levels.get(adapter)
        buffers = self.snella_sparsity[adapter], self.snella_threshold[adapter]
        if known is not None and (torch.compiler.is_compiling() or known.fits(*buffers)):
            return known
        self._levels[adapter] = Level.read(*buffers)
        return self._levels[adapter]

    def _require(self, adapter: str) -> SnellaConfig:
        if adapter not in self.configs:
            known = ", ".join(self.configs) or "none"
            raise ValueError(f"this layer has no adapter {adapter!r}; it has: {known}")
        config = self.configs[adapter]
        assert isinstance(config, SnellaConfig)
        return config


class SnellaModel(DeltaModel):
    """PEFT's model class for SNELLA."""

    prefix = "snella_"
    tuner_layer_cls = SnellaLayer


METHOD = Method(name="SNELLA", config=SnellaConfig, model=SnellaModel)


def fresh_factors(
    config: SnellaConfig,
    in_features: int,
    out_features: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A [H, I, q] and B [H, O, q] of a new adapter, float32 on the CPU.

    A is uniform within ±1/sqrt(I q) and B within ±1/sqrt(O q): what a Kaiming-uniform start with
    a = sqrt 5 gives a three-dimensional tensor, whose fan-in is its second times its third size.
    """
    bound_a, bound_b = config.init_bounds(in_features, out_features)
    A = torch.empty(config.heads, in_features, config.q).uniform_(
        -bound_a, bound_a, generator=generator
    )
    B = torch.empty(config.heads, out_features, config.q).uniform_(
        -bound_b, bound_b, generator=generator
    )
    if config.init == "identity":
        if config.kernel == "linear":
            B.zero_()
        else:
            A[1::2], B[1::2] = A[::2], B[::2]
    return A, B
