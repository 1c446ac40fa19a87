"""Low-rank compression of whole models with feature distillation (PELA)."""

from snell_diffusion.compress.distill import (
    Distiller,
    DistillSettings,
    block_names,
    caught_features,
    feature_loss,
)
from snell_diffusion.compress.files import load_compressed, save_compressed
from snell_diffusion.compress.low_rank import LowRankLinear, rank_for, split
from snell_diffusion.compress.pela import (
    CompressionReport,
    compress,
    low_rank_layers,
    penalty,
    tuner_targets,
)

__all__ = [
    "CompressionReport",
    "DistillSettings",
    "Distiller",
    "LowRankLinear",
    "block_names",
    "caught_features",
    "compress",
    "feature_loss",
    "load_compressed",
    "low_rank_layers",
    "penalty",
    "rank_for",
    "save_compressed",
    "split",
    "tuner_targets",
]
