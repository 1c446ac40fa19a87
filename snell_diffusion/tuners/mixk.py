"""MixK: SNELLA's mixed kernel with every entry kept, K + α·softmax(K / γ) + β. arXiv:2510.24037

A setting of SNELLA, computed and stored as such: files name SNELLA. The public scripts for Stanford
Cars, Caltech101 and SVHN train this.
"""

from dataclasses import dataclass
from typing import ClassVar

from snell_diffusion.tuners.base import config_field
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.snella import SnellaModel
from snell_diffusion.tuners.snella_config import ALLOCATION, SnellaConfig

__all__ = ["METHOD", "MixkConfig"]


@dataclass
class MixkConfig(SnellaConfig):
    """SnellaConfig with the mixed kernel and no sparsity."""

    method: ClassVar[str] = "MIXK"
    competes: ClassVar[bool] = False
    fixed: ClassVar[tuple[str, ...]] = ("kernel", "sparsify", "init_sparsity", *ALLOCATION)

    sparsify: str = config_field(SnellaConfig, "sparsify", "none")


METHOD = Method(
    name="MIXK",
    config=MixkConfig,
    model=SnellaModel,
    summary="mixed kernel (distances, their softmax, a constant) of low-rank factors, dense",
)
