"""The sensitivity pass of SPT methods on a run's own photos, before its adapters are built.

    accelerate launch train_dreambooth_snella.py ... --method spt_lora --method_args budget=200000

The base alone is loaded, its gradients on the first batches choose what is trained, and the run
then starts from a fresh base. A resumed run chooses again, from the same batches.
"""

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.families import family_of
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.objective import build_loss
from snell_diffusion.diffusion.setup import base_path, build_model, method_config
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.randomness import seed_torch
from snell_diffusion.tuners.recipes import recipe

__all__ = ["chosen"]


def chosen(config: TrainConfig, photos: Photos, parallel: Parallel) -> dict[str, Any] | None:
    """The selection of a method that wants one; None for every other.

    Raises:
        SnellaConfigError: A text encoder would be trained too, or the base is quantized: the pass
            needs gradients of the weights themselves, and chooses in the denoiser.
        SnellaValueError: The pass failed, or nothing comes close to the budget.
    """
    if not hasattr(recipe(config.method).kind, "wants_selection"):
        return None
    settings: Any = method_config(config, family_of(base_path(config), config.revision))
    if not settings.wants_selection:
        return None
    if config.train_text_encoder or config.base_quantization != "none":
        what = "train_text_encoder" if config.train_text_encoder else "base_quantization"
        raise SnellaConfigError(
            f"method {config.method} with a budget chooses weights of an unquantized denoiser: "
            f"leave {what} out, or leave the budget out and tune every target layer"
        )
    bare = replace(
        config,
        method="full",
        method_args=[],
        rank=None,
        update_scale=None,
        dropout=None,
        with_prior_preservation=False,
        prior_loss="images",
        new_tokens=[],
        initializer_token=None,
        torch_compile="no",
    )
    model = build_model(bare, parallel.device)
    with ExitStack() as closing:
        loss_at = build_loss(bare, model, photos.instance, [], parallel, closing)

        def losses() -> Iterator[Tensor]:
            for step in range(1, settings.batches + 1):
                seed_torch(config.seed, "sensitivity", step)
                with parallel.accelerator.autocast():
                    loss, _ = loss_at(step, 0)
                yield loss

        model.phases.enter("train")
        found = [settings.selected(model.denoiser, losses()).selection]
    broadcast_object_list(found)  # the processes see other batches
    del model
    gc.collect()
    return found[0]
