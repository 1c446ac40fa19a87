"""The sensitivity pass of SPT methods on a run's own images, before its adapters are built.

    python -m snell_diffusion.vision ... --method spt_lora --method_args budget=200000

Gradients of the base with its fresh head, on the first batches of the run, choose what is tuned. As
in the public code the model is in training mode and images are not augmented; unlike there, they
come in the run's shuffled order, since a folder sorted by class would show few classes.
"""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from peft import PeftConfig
from torch import Tensor

from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.randomness import seed_torch
from snell_diffusion.vision.batches import Order
from snell_diffusion.vision.config import VisionConfig
from snell_diffusion.vision.data import Inputs
from snell_diffusion.vision.loading import Base

__all__ = ["selected"]


def selected(
    settings: PeftConfig,
    config: VisionConfig,
    base: Base,
    inputs: Inputs,
    extra: int,
    parallel: Parallel,
) -> PeftConfig:
    """The settings with what the pass chooses, for methods that want it; others as they are.

    Args:
        settings: Of the method.
        config: The run; `train_batch_size` images make a batch.
        base: Where the gradients are taken, on its device.
        inputs: Training images as they are measured on, not augmented.
        extra: Numbers that are trained anyway and count too (a class token).
        parallel: The processes; all of them look at the same batches.

    Raises:
        SnellaValueError: The pass failed, or nothing comes close to the budget.
    """
    wanting: Any = settings
    if not getattr(wanting, "wants_selection", False):
        return settings
    order = Order(len(inputs), config.train_batch_size, config.seed)

    def losses() -> Iterator[Tensor]:
        for step in range(1, wanting.batches + 1):
            seed_torch(config.seed, "sensitivity", step)
            some = order.images(step)
            pixels = inputs.pixels(some).to(parallel.device)
            with parallel.accelerator.autocast():
                scores = base.family.logits(base.model, pixels).float()
            yield F.cross_entropy(scores, inputs.labels(some).to(parallel.device))

    base.model.train()
    sweep = config.protocol == "paper"
    found = [wanting.selected(base.model, losses(), extra=extra, public_sweep=sweep)]
    broadcast_object_list(found)
    chosen: PeftConfig = found[0]
    return chosen
