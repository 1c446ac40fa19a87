"""How far a run is: its sentence, its curves and its row in a table, from what it wrote."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snell_diffusion.app.event_log import Event
from snell_diffusion.app.job_record import JobStatus
from snell_diffusion.app.jobs import Jobs

POINTS = 400  # of a curve; a plot has fewer pixels than a run may have steps
TRAINING, HELD_OUT, BASE = "training", "held-out", "base model"
KINDS = (TRAINING, HELD_OUT, BASE)
UNKNOWN = "-"

Point = tuple[int, float, str]


@dataclass(frozen=True)
class Summary:
    """One run in a table.

    Attributes:
        job: Its id.
        subject: What it learns.
        base: Label of its base model.
        method: snella or lora.
        status: The state in one word.
        seconds: How long it was going.
        steps: Steps done of steps wanted.
        best_loss: Smallest held-out loss; None without held-out photos.
        started: Date and time of the server.
    """

    job: str
    subject: str
    base: str
    method: str
    status: str
    seconds: float
    steps: str
    best_loss: float | None
    started: str


def summary(
    job: str,
    info: Mapping[str, Any],
    status: JobStatus,
    seconds: float,
    events: Sequence[Event],
) -> Summary:
    """The row of a run from its job.json, its status and its log."""
    facts = info.get("facts") or {}
    return Summary(
        job=job,
        subject=subject(info),
        base=str(facts.get("base") or UNKNOWN),
        method=str(facts.get("method") or UNKNOWN),
        status=status.state,
        seconds=seconds,
        steps=_steps(status),
        best_loss=best_loss(events),
        started=moment(info["started"]),
    )


def summaries(jobs: Jobs) -> list[Summary]:
    """The rows of all runs, newest first."""
    return [
        summary(job, jobs.info(job), jobs.status(job), jobs.seconds(job), jobs.events(job))
        for job in jobs.all()
    ]


def subject(info: Mapping[str, Any]) -> str:
    """What a run learns, as its job.json says."""
    return str((info.get("facts") or {}).get("subject") or info.get("label") or UNKNOWN)


def moment(seconds: float) -> str:
    """Date and time of the server, from seconds since the epoch."""
    return time.strftime("%d %b %Y %H:%M", time.localtime(seconds))


def _steps(status: JobStatus) -> str:
    """The table is not redrawn with every step, so of a run that is going it says only where to."""
    if not status.total:
        return UNKNOWN
    return f"of {status.total}" if status.running else f"{status.step} of {status.total}"


def best_loss(events: Sequence[Event]) -> float | None:
    """The smallest held-out loss measured so far, None if none was."""
    losses = [e["validation_loss"] for e in events if _measured(e, "validation_loss")]
    return min(losses, default=None)


def curves(events: Sequence[Event]) -> list[Point]:
    """(step, loss, kind) of everything that is plotted, kind being one of KINDS.

    The training loss jumps with every timestep that is drawn, so it is shown as its mean over the
    last twentieth of the run. At most POINTS points of each kind.
    """
    steps = [event for event in events if _measured(event, "loss") and event["event"] == "step"]
    held_out = [event for event in events if _measured(event, "validation_loss")]
    means = smooth([event["loss"] for event in steps])
    training = [(e["step"], mean, TRAINING) for e, mean in zip(steps, means, strict=True)]
    points = [(e["step"], float(e["validation_loss"]), HELD_OUT) for e in held_out]
    base = [
        (e["step"], float(e["validation_loss_base"]), BASE)
        for e in held_out
        if _measured(e, "validation_loss_base")
    ]
    return [point for some in (training, points, base) for point in thinned(some)]


def _measured(event: Event, name: str) -> bool:
    value = event.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value) and "step" in event


def smooth(values: Sequence[float]) -> list[float]:
    """Trailing mean over a twentieth of the values, at least 5; shorter at the start."""
    window = max(5, len(values) // 20)
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return [float(mean) for mean in (total[ends] - total[starts]) / (ends - starts)]


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points at even distances, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, most).round().astype(int)]


def share(status: JobStatus) -> float:
    """How much of a run is done, 0 to 1."""
    return min(1.0, status.step / status.total) if status.total else 0.0


def sentence(status: JobStatus) -> str:
    """A run's status in words, with what to do next where there is something."""
    steps = f"step {status.step} of {status.total}" if status.total else "the first step"
    if status.state == "finished":
        return f"Finished: {steps}."
    if status.state == "failed":
        return f"Failed at {steps}. {status.message}{_from_saved(status)}"
    if not status.running:
        word = status.state.capitalize()
        return f"{word} at {steps}. {status.message}{_from_saved(status)}".replace(".  ", ". ")
    if status.state in ("pausing", "stopping"):
        return f"{status.state.capitalize()} at {steps}: the state is being saved."
    if status.step == 0 or status.state != "training":
        return f"{_GETTING_READY.get(status.state, status.state.capitalize())} ({steps})."
    left = "" if status.eta_s is None else f", about {duration(status.eta_s)} left"
    return f"Training: {steps}{left}."


_GETTING_READY = {
    "starting": "Starting: the model is being loaded",
    "preparing": "Preparing the photos",
    "class images": "Drawing pictures of the class",
    "sampling": "Drawing sample pictures",
    "saving": "Saving the adapter",
    "finishing": "Finishing",
}


def _from_saved(status: JobStatus) -> str:
    if status.resumable:
        return " It can be resumed from its last saved step."
    return " Nothing was saved yet: it can be started again."


def duration(seconds: float) -> str:
    """A time in the two units that matter: 45 s, 1 min 30 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
