"""KLoRA: SNELL's distance kernel with every entry kept, K itself. arXiv:2411.01800

A setting of SNELLA, computed and stored as such: files name SNELLA.
"""

from dataclasses import dataclass
from typing import ClassVar

from snell_diffusion.tuners.base import config_field
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.snella import SnellaModel
from snell_diffusion.tuners.snella_config import ALLOCATION, SnellaConfig

__all__ = ["METHOD", "KloraConfig"]


@dataclass
class KloraConfig(SnellaConfig):
    """SnellaConfig with the distance kernel and no sparsity."""

    method: ClassVar[str] = "KLORA"
    competes: ClassVar[bool] = False
    fixed: ClassVar[tuple[str, ...]] = (
        *("kernel", "sparsify", "init_sparsity"),
        *("train_alpha", "train_gamma", "train_beta"),
        *ALLOCATION,
    )

    kernel: str = config_field(SnellaConfig, "kernel", "distance")
    sparsify: str = config_field(SnellaConfig, "sparsify", "none")


METHOD = Method(
    name="KLORA",
    config=KloraConfig,
    model=SnellaModel,
    summary="distance kernel of low-rank factors, dense",
)
