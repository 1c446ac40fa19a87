"""SNELLA: kernelized, sparse high-rank updates whose layers compete for what may survive.

    ΔW = scale · sparsify(K + alpha·softmax(K / gamma) + beta, level)ᵀ
    K[i, o] = Σ_h c_h |A[h, i] − B[h, o]|_p,   c_h = 0.1 · (−1)^h       arXiv:2510.24037, 2411.01800

Shape legend: I in features, O out features, H heads, q = r / H; A [H, I, q], B [H, O, q].
The formula itself is `snell_diffusion.core.update`; this file holds its settings and parameters.
Where paper and public code differ, `SnellaConfig.paper` follows the code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snell_diffusion.core import DeltaFn, KernelUpdate, threshold
from snell_diffusion.core.bounds import update_bound
from snell_diffusion.tuners.base import DeltaConfig, DeltaModel
from snell_diffusion.tuners.containers import PreciseBufferDict, PreciseParameterDict
from snell_diffusion.tuners.conv import ConvLayer
from snell_diffusion.tuners.few_bits import used
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.snella_config import SIGN, SnellaConfig

__all__ = ["METHOD", "SnellaConfig", "SnellaConvLayer", "SnellaLayer", "SnellaModel"]


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

    With fewer `bits` than 32, A and B are latents: every forward pass uses the levels nearest to
    them (`core.quantize`), straight through for gradients, and files hold those.
    """

    adapter_layer_names = ("snella_A", "snella_B", "snella_alpha", "snella_gamma", "snella_beta")
    packed_names = ("snella_A", "snella_B")
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
        self.limits: dict[str, Tensor] = {}

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
        A, B, *scalars = (
            container[adapter]
            for container in (getattr(self, name) for name in self.adapter_layer_names)
            if adapter in container
        )
        config = self._require(adapter)
        return used(A, config), used(B, config), *scalars

    def delta_state(self, adapter: str) -> tuple[Tensor, ...]:
        return (
            self.snella_signs[adapter],
            self.snella_sparsity[adapter],
            self.snella_threshold[adapter],
        )

    def delta_fn(self, adapter: str) -> DeltaFn:
        return self.kernel_update(adapter)

    def kernel_update(self, adapter: str) -> KernelUpdate:
        """The update at the level of this moment, as a function of `delta_params`."""
        config, level = self._require(adapter), self._level(adapter)
        # A number would be a constant of compiled code, which every new level would invalidate.
        compiling = torch.compiler.is_compiling()
        return KernelUpdate(
            signs=self.snella_signs[adapter],
            sparsity=0.0 if compiling else level.value,
            kernel=config.kernel,
            p=config.p,
            rule=config.sparsify,
            limit=self.snella_threshold[adapter] if level.stored else self.limits.get(adapter),
            level=self.snella_sparsity[adapter],
        )

    @classmethod
    def norm_bound(cls, config: SnellaConfig, tensors: Mapping[str, Tensor]) -> float:
        A, B, signs = (tensors[f"snella_{name}"] for name in ("A", "B", "signs"))
        alpha, beta = (tensors.get(f"snella_{name}") for name in ("alpha", "beta"))
        kernel, p, rule = config.kernel, config.p, config.sparsify
        return abs(config.scale) * update_bound(
            A, B, signs, alpha, beta, kernel=kernel, p=p, rule=rule
        )

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
        with torch.no_grad(), self._onloaded():
            return self.kernel_update(adapter).whole(self.delta_params(adapter)).T

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [H, I, q] and B [H, O, q]: what the competition reads."""
        return self.snella_A[adapter], self.snella_B[adapter]

    def train(self, mode: bool = True) -> "SnellaLayer":
        super().train(mode)
        # Compiled code reads the remembered levels; a switch of mode brings them up to date.
        for adapter in self.configs:
            self.reread(adapter)
        return self

    def reread(self, adapter: str) -> None:
        super().reread(adapter)
        if not self.snella_sparsity[adapter].is_meta:
            self._level(adapter)

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


class SnellaConvLayer(ConvLayer, SnellaLayer):
    """A Conv2d with SNELLA updates of its flattened kernels.

    One more buffer, `snella_kernel` [3], tells kernel height, kernel width and groups, for a file
    whose header is lost: the factors alone do not.
    """

    other_param_names = (*SnellaLayer.other_param_names, "snella_kernel")

    def add_containers(self) -> None:
        super().add_containers()
        self.snella_kernel = PreciseBufferDict()

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        super().create_tensors(adapter, config, generator)
        conv = self.get_base_layer()
        self.snella_kernel[adapter] = torch.tensor([*conv.kernel_size, conv.groups]).float()


class SnellaModel(DeltaModel):
    """PEFT's model class for SNELLA."""

    prefix = "snella_"
    tuner_layer_cls = SnellaLayer
    conv_layer_cls = SnellaConvLayer


METHOD = Method(
    name="SNELLA",
    config=SnellaConfig,
    model=SnellaModel,
    summary="kernelized sparse high-rank update; layers compete for a budget of kept weights",
)


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
