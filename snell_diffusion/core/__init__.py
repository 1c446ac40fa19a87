"""The papers' mathematics: update matrices, sparsity, merging, allocation. Needs torch alone."""

from .allocator import METRICS, Allocator
from .apportion import apportion
from .blocks import BlockUpdate, DeltaFn, ScaledSum, WholeUpdate, fold
from .grouped import Member, grouped_thresholds, grouped_weights
from .kernel_update import KernelUpdate
from .kernels import GAMMA_MIN, distance_kernel, linear_kernel, mix, positive_gamma
from .merge import merged_linear
from .merge_conv import Geometry, merged_conv2d
from .sparsify import (
    LIVE_AT_ZERO,
    RULES,
    FirstThreshold,
    kept_count,
    sparsify,
    sparsity_for,
    threshold,
)
from .update import KERNELS, dense, update

__all__ = [
    "GAMMA_MIN",
    "KERNELS",
    "LIVE_AT_ZERO",
    "METRICS",
    "RULES",
    "Allocator",
    "BlockUpdate",
    "DeltaFn",
    "FirstThreshold",
    "Geometry",
    "KernelUpdate",
    "Member",
    "ScaledSum",
    "WholeUpdate",
    "apportion",
    "dense",
    "distance_kernel",
    "fold",
    "grouped_thresholds",
    "grouped_weights",
    "kept_count",
    "linear_kernel",
    "merged_conv2d",
    "merged_linear",
    "mix",
    "positive_gamma",
    "sparsify",
    "sparsity_for",
    "threshold",
    "update",
]
