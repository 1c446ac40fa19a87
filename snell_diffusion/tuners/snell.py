"""SNELL: SNELLA's distance kernel at one fixed sparsity level per layer. arXiv:2411.01800

    ΔW = scale · sparsify(K, level)ᵀ,   K[i, o] = Σ_h c_h |A[h, i] − B[h, o]|_p

It is a setting of SNELLA, computed and stored as such: files name SNELLA. Every layer keeps the
same share of its entries; none compete. The public tuner builds KLoRA (`klora.py`) where the level
is exactly 0; here level 0 stays what the formula says: the kept entries are squared, and only the
smallest is dropped.
"""

from dataclasses import dataclass
from typing import ClassVar

from snell_diffusion.tuners.base import config_field
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.snella import SnellaModel
from snell_diffusion.tuners.snella_config import ALLOCATION, SnellaConfig

__all__ = ["METHOD", "SnellConfig"]


@dataclass
class SnellConfig(SnellaConfig):
    """SnellaConfig with the distance kernel; `init_sparsity` is the level of the whole training."""

    method: ClassVar[str] = "SNELL"
    competes: ClassVar[bool] = False
    fixed: ClassVar[tuple[str, ...]] = (
        *("kernel", "train_alpha", "train_gamma", "train_beta"),
        *ALLOCATION,
    )

    kernel: str = config_field(SnellaConfig, "kernel", "distance")
    init_sparsity: float = config_field(SnellaConfig, "init_sparsity", 0.5)


METHOD = Method(
    name="SNELL",
    config=SnellConfig,
    model=SnellaModel,
    summary="distance kernel of low-rank factors, sparsified to one level in every layer",
)
