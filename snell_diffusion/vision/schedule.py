"""The learning rate over a run, in epochs t of T in all, after a warmup of w epochs.

    t < w:   start + (peak − start) t / w
    else:    floor + (peak − floor) (1 + cos π τ) / 2

Ours ("step"): t is the middle of a step, τ = (t − w) / (T − w). Published ("epoch"): t is the index
of the epoch that was finished last, so epochs 0 and 1 both run at t = 0, and τ = t / T, which makes
the rate jump down a little where the warmup ends.
"""

import math
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from snell_diffusion.vision.config import VisionConfig


def warmed(t: float, warmup: float, start: float, peak: float, after: float) -> float:
    """The rate at t: on the line from start to peak before `warmup`, else `after`."""
    return start + (peak - start) * t / warmup if t < warmup else after


def cosine(share: float, peak: float, floor: float) -> float:
    """From peak at share 0 down to floor at share 1, and floor after it."""
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def rate_at(config: VisionConfig, peak: float, step: int, per_epoch: int, steps: int) -> float:
    """The learning rate of one optimizer step.

    Args:
        config: Shape, warmup, start and floor.
        peak: Highest rate of a group of parameters.
        step: Steps done before it, from 0.
        per_epoch: Steps of an epoch.
        steps: Steps of the run.
    """
    total = steps / per_epoch
    warmup = float(config.warmup_epochs or 0.0)
    start, floor = min(config.warmup_lr or 0.0, peak), min(config.min_lr or 0.0, peak)
    if config.lr_update == "epoch":
        t: float = max(0, step // per_epoch - 1)
        share = t / math.ceil(total)
    else:
        t = (step + 0.5) / per_epoch
        share = (t - warmup) / max(total - warmup, 1 / per_epoch)
    after = peak if config.lr_scheduler == "constant" else cosine(share, peak, floor)
    return warmed(t, warmup, start, peak, after)


def build_scheduler(
    config: VisionConfig, optimizer: torch.optim.Optimizer, per_epoch: int, steps: int
) -> LambdaLR:
    """`rate_at` for every group of an optimizer, stepped with every optimizer step."""
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(_factor, config, peak, per_epoch, steps) for peak in peaks])


def _factor(config: VisionConfig, peak: float, per_epoch: int, steps: int, step: int) -> float:
    return rate_at(config, peak, step, per_epoch, steps) / peak
