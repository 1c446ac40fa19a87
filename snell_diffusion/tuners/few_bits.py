"""What the one-bit adapters share: settings, start, and the values a forward pass uses.

Shape legend: down [r, I], up [O, r]. The formulas are in `snell_diffusion.core.quantize`;
Bi-adapters (arXiv:2307.16867).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from snell_diffusion.core.quantize import BITS, packed_bytes, quantize
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.base import DeltaConfig, check_bool

__all__ = ["FLOAT_BITS", "FewBitsConfig", "fresh_pair", "used"]

FLOAT_BITS = 32
SPREAD = 1e-3


@dataclass
class FewBitsConfig(DeltaConfig):
    """Settings of adapters whose matrices are stored in a few bits.

    Raises:
        SnellaConfigError: A value is out of range.
    """

    bits: int = field(
        default=1,
        metadata={"help": "bits of every stored number: 1, 2, 4, 8, or 32 for plain floats"},
    )
    quantized: bool = field(
        default=False,
        metadata={
            "help": "whether the adapter's tensors are final values, as read from a packed file, "
            "which are not quantized again: trained further they are plain floats"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*BITS, FLOAT_BITS)
        if type(self.bits) is not int or self.bits not in known:
            expected = ", ".join(map(str, known))
            raise SnellaConfigError(f"bits must be one of {expected}, got {self.bits!r}")
        check_bool("quantized", self.quantized)

    @classmethod
    def stored(
        cls, settings: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> Self:
        # Files hold the values that the bits stand for, whether they are packed or not.
        final = settings.get("bits", FLOAT_BITS) != FLOAT_BITS
        return super().stored({**settings, "quantized": final}, shapes)

    @property
    def latent(self) -> bool:
        """Whether the tensors are what is quantized, not what is multiplied by."""
        return self.bits != FLOAT_BITS and not self.quantized

    def stored_bytes(self, *numels: int) -> int:
        """Bytes of some matrices in a packed file: their codes and 8 each, or 4 a number."""
        if self.bits == FLOAT_BITS:
            return 4 * sum(numels)
        return sum(packed_bytes(numel, self.bits) for numel in numels)


def used(W: Tensor, config: FewBitsConfig) -> Tensor:
    """What a forward pass multiplies by; differentiable straight through."""
    return quantize(W, config.bits) if config.latent else W


def fresh_pair(
    in_features: int, out_features: int, config: FewBitsConfig, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """down [r, I] and up [O, r] of a new adapter, float32 on the CPU.

    down is uniform within ±1/sqrt(I), a Linear's own start. up is normal with deviation 1e-3, cut
    at twice that, since a matrix of zeros has no levels: the update starts small, not at zero. As
    plain floats up starts at zero.
    """
    bound = 1 / math.sqrt(in_features)
    down = torch.empty(config.r, in_features).uniform_(-bound, bound, generator=generator)
    up = torch.zeros(out_features, config.r)
    if config.bits != FLOAT_BITS:
        torch.nn.init.trunc_normal_(
            up, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD, generator=generator
        )
    return down, up
