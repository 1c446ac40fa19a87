"""Check everything a run needs with one real step, and write nothing."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.framing import shapes
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.objective import build_loss
from snell_diffusion.diffusion.optimization import build_state, loop_settings
from snell_diffusion.diffusion.results import RunResult
from snell_diffusion.diffusion.setup import build_model, size_notes
from snell_diffusion.training.loop import train
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.training.tracking import Event, Tracker, peak_memory


def dry_run(
    config: TrainConfig,
    photos: Photos,
    parallel: Parallel,
    stop: StopRequest,
    on_event: Callable[[Event], None] | None,
) -> RunResult:
    """Load all, do one step, tell sizes and memory.

    Missing class images are not generated; photos of the subject stand in for them.
    """
    began = time.monotonic()
    tracker = Tracker(None, 1, on_event, main=parallel.main)
    model = build_model(config, parallel.device, parallel)
    state = build_state(config, model.components, parallel)
    prior = photos.stand_ins(config)
    with ExitStack() as closing:
        loss_at = build_loss(config, model, photos.instance, prior, parallel, closing)
        step_began = time.monotonic()
        settings = dataclasses.replace(loop_settings(config), steps=1)
        train(state, loss_at, settings, parallel, lambda numbers: None, stop)
    seconds, memory = time.monotonic() - step_began, peak_memory(model.device)
    size = model.sizes
    lines = [
        f"base: {config.pretrained_model_name_or_path} ({model.family.name}), {size.base:,} "
        f"parameters",
        f"adapter: {config.method}, {size.trainable:,} trainable parameters in {size.layers} "
        f"layers ({size.adapted:,} weights)",
        *photos.summary(config, shapes(config, model.family.multiple)),
        *size_notes(config, model),
        f"one step: {seconds:.2f} s, peak memory {memory / 2**30:.2f} GiB",
        "dry run: all checks passed, nothing was written",
    ]
    for line in lines:
        tracker.note(line)
    elapsed = time.monotonic() - began
    path = Path(config.output_dir)
    return RunResult(path, None, None, None, tracker.history, elapsed, memory, size)
