"""What the page's buttons do, free of page components: plain values in, plain values out."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from snell_diffusion.app.embedded_studio import Studio
from snell_diffusion.app.job_record import ENDED, JobStatus
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.photos import store_photos
from snell_diffusion.diffusion.config_files import make_config, read_config
from snell_diffusion.errors import SnellaError, SnellaValueError

TOKEN = "sks"  # the rare word that comes to mean the subject
STEP_RANGE = (1, 2000)
CLASS_WORD = re.compile(r"[A-Za-z][A-Za-z -]{0,29}")


@dataclass(frozen=True)
class Progress:
    """What the page shows of a run: a sentence, the share done (0 to 1), losses, newest samples."""

    sentence: str
    share: float
    running: bool
    losses: list[tuple[int, float]]
    samples: Image.Image | None


class Actions:
    """The page's verbs over one root of runs and one pipeline.

    Args:
        jobs: Where runs live.
        studio: Draws pictures.
        recipe: YAML file with the training settings that the page does not ask for.
    """

    def __init__(self, jobs: Jobs, studio: Studio, recipe: Path) -> None:
        self.jobs = jobs
        self.studio = studio
        self.recipe = recipe

    def train(self, uploads: Sequence[str | Path], class_word: str, steps: int, seed: int) -> str:
        """Check everything, start a run and return its id.

        Raises:
            SnellaError: A bad photo, word or number, or another run is going.
        """
        word = class_word.strip().lower()
        if not CLASS_WORD.fullmatch(word):
            raise SnellaValueError(
                "say in one or two English words what the subject is, for example cat or teapot"
            )
        low, high = STEP_RANGE
        if not low <= steps <= high:
            raise SnellaValueError(f"the steps must be {low} to {high}, got {steps}")
        if self.jobs.active() is not None:
            raise SnellaValueError("a run is going already: wait for it or stop it first")
        job = self.jobs.new()
        folder = self.jobs.folder(job)
        try:
            photos = store_photos(uploads, folder / "photos")
            settings = self.settings(folder, word, int(steps), int(seed))
            self.jobs.start(job, settings, f"{word}, {len(photos)} photos, {int(steps)} steps")
        except SnellaError:
            shutil.rmtree(folder)
            raise
        return job

    def settings(self, folder: Path, word: str, steps: int, seed: int) -> dict[str, Any]:
        """The recipe with this run's photos, prompts, steps and seed.

        Raises:
            SnellaConfigError: The values do not make a valid configuration.
        """
        values = {
            **read_config(self.recipe),
            "instance_data_dir": str(folder / "photos"),
            "instance_prompt": f"a photo of a {TOKEN} {word}",
            "class_prompt": f"a photo of a {word}",
            "class_data_dir": None,
            "validation_data_dir": None,
            "num_validation_photos": 0,
            "validation_prompt": f"a photo of a {TOKEN} {word}",
            "sample_prompts": [f"a photo of a {TOKEN} {word} in the snow"],
            "max_train_steps": steps,
            "sample_steps": max(1, steps // 5),
            "seed": seed,
        }
        make_config(values, where="this run's settings")
        return values

    def progress(self, job: str) -> Progress:
        """Where a run is, for display.

        Raises:
            SnellaValueError: No such run.
        """
        status = self.jobs.status(job)
        sheets = self.jobs.samples(job)
        return Progress(
            sentence=sentence(status),
            share=status.step / status.total if status.total else 0.0,
            running=status.state not in ENDED,
            losses=smooth(
                [(e["step"], e["loss"]) for e in self.jobs.events(job) if e["event"] == "step"]
            ),
            samples=_open(sheets[-1][1]) if sheets else None,
        )

    def stop(self, job: str) -> None:
        """Ask a run to end after the current step.

        Raises:
            SnellaValueError: No such run.
        """
        self.jobs.stop(job)

    def runs(self) -> list[tuple[str, str]]:
        """(what to show, id) of every run, newest first."""
        return [(self._title(job), job) for job in self.jobs.all()]

    def _title(self, job: str) -> str:
        info = self.jobs.info(job)
        started = time.strftime("%d %b %H:%M", time.localtime(info["started"]))
        return f"{info['label']} ({started})"

    def draw(
        self, job: str, prompt: str, seed: int, strength: float, sparsity: float | None
    ) -> tuple[Image.Image, Image.Image]:
        """Base and adapted picture; see Studio.draw.

        Raises:
            SnellaError: No such run, no adapter yet, or a value out of range.
        """
        adapter = self.jobs.adapter(job)
        return self.studio.draw(prompt, int(seed), adapter, strength, sparsity)


def sentence(status: JobStatus) -> str:
    """A run's status in words."""
    steps = f"step {status.step} of {status.total}"
    if status.state == "failed":
        return f"The run failed at {steps}. {status.message}"
    if status.state in ENDED:
        return f"The run is {status.state} at {steps}."
    if status.step == 0:
        return f"Getting ready: {status.state}."
    left = "" if status.eta_s is None else f", {duration(status.eta_s)} left"
    return f"{status.state.capitalize()}: {steps}{left}."


def duration(seconds: float) -> str:
    """90 -> '1 min 30 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def smooth(losses: list[tuple[int, float]], window: int = 20) -> list[tuple[int, float]]:
    """Mean over the last `window` steps: a diffusion loss jumps with every timestep drawn."""
    values = [loss for _, loss in losses]
    return [
        (step, float(np.mean(values[max(0, i - window + 1) : i + 1])))
        for i, (step, _) in enumerate(losses)
    ]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
