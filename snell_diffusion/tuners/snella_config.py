"""SNELLA's settings; the formula they set is in snella.py and `snell_diffusion.core.update`."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from snell_diffusion.core import KERNELS, LIVE_AT_ZERO, METRICS, RULES
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.base import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    config_field,
)
from snell_diffusion.tuners.few_bits import FLOAT_BITS, FewBitsConfig

__all__ = ["ALLOCATION", "DIFFUSION", "INITS", "SIGN", "VISION", "SnellaConfig"]

INITS = ("paper", "identity")
SIGN = 0.1
"""Size of the head coefficients, +0.1 and -0.1 in turn; the public code's only scale."""
ALLOCATION = (
    *("target_sparsity", "alloc_init_warmup", "alloc_final_warmup", "alloc_interval"),
    *("alloc_beta1", "alloc_beta2", "alloc_metric"),
)
"""Settings of the layers' competition."""


@dataclass
class SnellaConfig(FewBitsConfig):
    """Settings of SNELLA; start from `SnellaConfig.paper()` or `SnellaConfig.diffusion()`.

    A fresh adapter moves no weight by more than `max_fresh_update`: 0 with init "identity"; with
    init "paper" and the squared rule at most 7.3e-5 in a 768x768 layer (measured: 1.9e-5), against
    weights of about 2e-2.
    """

    method: ClassVar[str] = "SNELLA"
    competes: ClassVar[bool] = True
    """Whether layers compete for a common budget while training."""
    later: ClassVar[tuple[str, ...]] = ("bits",)

    bits: int = config_field(FewBitsConfig, "bits", FLOAT_BITS)

    heads: int = field(default=2, metadata={"help": "kernels of alternating sign; must divide r"})
    kernel: str = field(
        default="mixed",
        metadata={
            "help": "'mixed': distances, their softmax and a constant (SNELLA); 'distance': "
            "distances alone (SNELL); 'linear': inner products, as in LoRA"
        },
    )
    p: float = field(
        default=2.0, metadata={"help": "norm of the distances, 1 to 1e6; 2 is Euclidean"}
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
        default=1.0,
        metadata={"help": "factor on the range A and B are drawn from, above 0, up to 1e12"},
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
        check_number("p", self.p, "1 to 1e6", lambda p: 1 <= p <= 1e6)
        check_number(
            "init_scale", self.init_scale, "above 0, up to 1e12", lambda scale: 0 < scale <= 1e12
        )
        # An adapter file holds numbers of 1e-28 and more exactly, and 0.
        check_number(
            "init_sparsity",
            self.init_sparsity,
            "0 or more and below 1, and 1e-12 or more unless it is 0",
            lambda s: s == 0 or 1e-12 <= s < 1,
        )
        for name in ("target_sparsity", "alloc_beta1", "alloc_beta2"):
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

    @classmethod
    def vision(cls, **changes: Any) -> "SnellaConfig":
        """Our setting for classification with vision transformers; `changes` win over it."""
        return cls(**{**VISION, **changes})

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
    "train_beta": False,
    "scale": 4.0,
}
"""What `SnellaConfig.diffusion` changes of the paper's setting; measured in docs/experiments.md."""

VISION: dict[str, Any] = {}
"""What `SnellaConfig.vision` changes of the paper's setting: nothing, as none of six variations was
better by more than chance (docs/experiments.md)."""
