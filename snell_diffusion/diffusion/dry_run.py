"""Check everything a run needs with a few real steps and one picture, and write nothing."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_idle import idle_settings
from snell_diffusion.diffusion.framing import shapes
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.objective import build_loss
from snell_diffusion.diffusion.optimization import build_state, loop_settings
from snell_diffusion.diffusion.phases import WORK
from snell_diffusion.diffusion.results import RunResult
from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.diffusion.sensitivity import chosen
from snell_diffusion.diffusion.setup import Model, build_model, size_notes
from snell_diffusion.training.adapter_tensors import evaluating
from snell_diffusion.training.loop import LossAt, TrainState, train
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.peaks import PeakMeter
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.training.tracking import Event, Tracker, peak_memory

# The first steps of a process are slow: kernels are chosen, or compiled.
_STEPS = 3
_WORK = {"load": "loading the base", **WORK, "checkpoint": "a checkpoint"}


def dry_run(
    config: TrainConfig,
    photos: Photos,
    parallel: Parallel,
    stop: StopRequest,
    on_event: Callable[[Event], None] | None,
) -> RunResult:
    """Load all, do a few steps, draw a picture where the run will, tell sizes, time and memory.

    Missing class images are not generated; photos of the subject stand in for them.
    """
    began = time.monotonic()
    tracker = Tracker(None, 1, on_event, main=parallel.main)
    meter = PeakMeter(parallel.device)
    meter("load")
    selection = chosen(config, photos, parallel)
    model = build_model(config, parallel.device, parallel, selection)
    state = build_state(config, model.components, parallel)
    model.phases.listen(meter)
    with ExitStack() as closing:
        prior = photos.stand_ins(config)
        loss_at = build_loss(config, model, photos.instance, prior, parallel, closing)
        seconds = _time_of_a_step(config, state, loss_at, parallel, stop)
    if config.prompts or config.uses_class_images:
        _draw(config, model, parallel)
    meter("checkpoint")
    saved = _size_of_a_checkpoint(state)
    meter.close()
    size, memory = model.sizes, peak_memory(model.device)
    total = timedelta(seconds=round(seconds * config.max_train_steps))
    lines = [
        f"base: {config.pretrained_model_name_or_path} ({model.family.name}), {size.base:,} "
        f"parameters",
        f"adapter: {config.method}, {size.trainable:,} trainable parameters in {size.layers} "
        f"layers ({size.adapted:,} weights)",
        *photos.summary(config, shapes(config, model.family.multiple)),
        *size_notes(config, model),
        *idle_settings(config),
        f"one step: {seconds:.2f} s; {config.max_train_steps} steps take about {total}, without "
        f"pictures and class images",
        f"one checkpoint: {saved / 2**20:.1f} MiB on disk",
        f"peak memory by phase ({'GPU' if model.device.type == 'cuda' else 'resident'}):",
        *(f"  {_WORK[phase]}: {peak / 2**30:.2f} GiB" for phase, peak in meter.peaks.items()),
        "dry run: all checks passed, nothing was written",
    ]
    for line in lines:
        tracker.note(line)
    tracker.event("peaks", **meter.peaks)
    elapsed = time.monotonic() - began
    path = Path(config.output_dir)
    return RunResult(path, None, None, None, tracker.history, elapsed, memory, size)


def _time_of_a_step(
    config: TrainConfig, state: TrainState, loss_at: LossAt, parallel: Parallel, stop: StopRequest
) -> float:
    """Seconds of the last of the steps done."""
    ends = [time.monotonic()]
    settings = loop_settings(config)
    settings = dataclasses.replace(settings, steps=min(_STEPS, settings.steps))
    train(state, loss_at, settings, parallel, lambda numbers: ends.append(time.monotonic()), stop)
    return ends[-1] - ends[-2]


def _draw(config: TrainConfig, model: Model, parallel: Parallel) -> None:
    """One picture in two steps, which take the memory of many."""
    sampler = Sampler(
        model,
        size=config.resolution,
        steps=min(2, config.num_inference_steps),
        guidance=config.guidance_scale,
        seed=config.seed,
    )
    prompt = [*config.prompts, config.subjects[0].class_prompt or ""][0]
    with evaluating(model.components), parallel.accelerator.autocast():
        sampler.draw([prompt], "sample", [0])


def _size_of_a_checkpoint(state: TrainState) -> int:
    tensors, _ = state.pack()
    parts: list[Tensor] = [part for group in tensors.values() for part in group.values()]
    return sum(part.numel() * part.element_size() for part in parts)
