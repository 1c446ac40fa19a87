"""How long a training will take here and how much memory: from earlier runs, else from a reference.

The reference are trainings of the shipped bases with the object preset on the six photos of a
backpack, on two cores of a server, on 21 November 2026: embedded 45 steps, embedded-dit 150 steps,
`accelerate launch train_dreambooth_snella.py --config settings.yaml`. Other work shared those
cores, so the figures are of the quickest tenth of the steps and sheets. Another machine's speed
relative to it is measured once, on one core, and kept with the runs.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from snell_diffusion.app.bases import Base
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.errors import SnellaError
from snell_diffusion.training.files import write_json

LOOK_BACK = 20  # runs that are looked at for one of the same cost
# Settings that decide what a step and a sample sheet cost.
COST = (
    "pretrained_model_name_or_path",
    "resolution",
    "aspect_ratio_buckets",
    "method",
    "rank",
    "target_modules",
    "train_text_encoder",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "mixed_precision",
    "with_prior_preservation",
    "prior_loss",
    "num_inference_steps",
)


@dataclass(frozen=True)
class Reference:
    """What a training cost on the reference machine.

    Attributes:
        start: Seconds until the first step: loading, the base's sample sheet.
        step: Seconds of an optimizer step on 4 photos.
        sheet: Seconds of a sample sheet, its held-out loss and a checkpoint.
        memory: Peak bytes of the process.
        speed: Passes a second there, see measure_speed.
    """

    start: float
    step: float
    sheet: float
    memory: float
    speed: float


REFERENCE = {
    "embedded": Reference(start=12.0, step=0.73, sheet=2.6, memory=0.79 * 2**30, speed=2350.0),
    "embedded-dit": Reference(start=14.0, step=0.78, sheet=3.5, memory=0.83 * 2**30, speed=2350.0),
}


@dataclass(frozen=True)
class Estimate:
    """What to expect.

    Attributes:
        seconds: From the start to the adapter; None: unknown.
        memory: Peak bytes; None: unknown.
        basis: Where the numbers come from.
    """

    seconds: float | None
    memory: float | None
    basis: str

    def sentence(self) -> str:
        """'about 3 min, 0.7 GiB'."""
        if self.seconds is None:
            return "unknown before a first run"
        memory = "" if self.memory is None else f", {self.memory / 2**30:.1f} GiB"
        return f"about {duration(self.seconds)}{memory}"


def duration(seconds: float) -> str:
    """Rounded as an estimate should be: '40 s', '3 min', '2 h 10 min'."""
    if seconds < 55:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {10 * (rest // 10)} min"


def estimate(jobs: Jobs, base: Base, settings: Mapping[str, Any], machine: Path) -> Estimate:
    """Time and memory of a training on this machine.

    Args:
        jobs: Whose earlier runs tell.
        base: What is trained.
        settings: Of the run.
        machine: JSON file that keeps this machine's measured speed.
    """
    earlier = _earlier(jobs, settings)
    if earlier is not None:
        return earlier
    if base.id in REFERENCE and not torch.cuda.is_available():
        return _scaled(REFERENCE[base.id], settings, speed_here(machine))
    return Estimate(None, None, "no run of this kind has been done on this machine")


def _earlier(jobs: Jobs, settings: Mapping[str, Any]) -> Estimate | None:
    """From the newest finished run of the same cost."""
    wanted = _cost_of(settings)
    for job in jobs.all()[:LOOK_BACK]:
        try:
            if _cost(jobs.folder(job) / "settings.yaml") != wanted:
                continue
            if jobs.status(job).state != "finished":
                continue
            steps = [event for event in jobs.events(job) if event["event"] == "step"]
            seconds = [event["seconds"] for event in steps]
            around = max(0.0, jobs.seconds(job) - sum(seconds))
        except (SnellaError, OSError, KeyError):  # deleted meanwhile, or a log of another version
            continue
        if steps:
            each = statistics.fmean(seconds)
            memory = max(event["memory"] for event in steps)
            total = around + each * settings["max_train_steps"]
            return Estimate(total, memory, "from your last run with these settings")
    return None


def _cost_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(repr(settings.get(name)) for name in COST)


@lru_cache(maxsize=256)
def _cost(settings: Path) -> tuple[str, ...]:
    """Cost of a started run; its file never changes, and reading YAML takes milliseconds."""
    return _cost_of(yaml.safe_load(settings.read_text("utf-8")))


def _scaled(known: Reference, settings: Mapping[str, Any], speed: float) -> Estimate:
    steps = settings["max_train_steps"]
    pictures = settings["train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    sheets = steps / settings["sample_steps"]
    seconds = known.start + steps * known.step * pictures / 4 + sheets * known.sheet
    seconds *= known.speed / speed * slowdown()
    return Estimate(seconds, known.memory, "from this machine's speed and what it does now")


def slowdown() -> float:
    """How much longer one more training takes beside what runs now; 1 on an idle machine.

    It keeps 1.4 cores busy with 2 threads, which get their share of the cores. Seen with 2 cores:
    load 2.2, 5.3 and 9.3 gave 1.6, 3.0 and 3.4; the formula says 1.5, 2.6 and 4.0.
    """
    share = 2 / (os.getloadavg()[0] + 2) * (os.cpu_count() or 1)
    return max(1.0, 1.4 / share)


def speed_here(machine: Path) -> float:
    """Passes a second on this machine, measured once and kept in a file."""
    if machine.is_file():
        return float(json.loads(machine.read_text("utf-8"))["passes_per_second"])
    speed = measure_speed()
    machine.parent.mkdir(parents=True, exist_ok=True)
    what = "matrix products of 64 x 64 and steps on 65,536 numbers, on one core, processor time"
    record = {"passes_per_second": speed, "measured": what, "at": time.time()}
    write_json(machine, record, durable=False)
    return speed


def measure_speed(seconds: float = 0.5) -> float:
    """Passes a second of small multiplications and element-wise steps on one core.

    The quickest pass counts, in processor time: what other programs do meanwhile must not.
    """
    x = np.linspace(0, 1, 2**16, dtype=np.float32)
    square = x[: 64 * 64].reshape(64, 64)
    taken: list[float] = []
    while sum(taken) < seconds:
        began = time.thread_time()
        y = np.sqrt(np.exp(x))
        for _ in range(20):
            square @ square
            y = y * x + x
        taken.append(time.thread_time() - began)
    return 1 / min(taken)
