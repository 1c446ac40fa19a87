"""What a user sees of a run while it goes on: held-out loss, drift, sample sheets, allocation."""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.diffusion.validation import Probe
from snell_diffusion.training.adapter_tensors import (
    adapters_off,
    evaluating,
    trainable_parameters,
)
from snell_diffusion.training.errors import OutputError
from snell_diffusion.training.files import write_with
from snell_diffusion.training.finite import require_finite_weights
from snell_diffusion.training.loop import TrainState
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.plots import (
    allocation_picture,
    loss_curve,
    sheet,
    stack_sheets,
)
from snell_diffusion.training.tracking import Tracker, read_log

_CELL = 128
_RECORDS = 20


class RunFeedback:
    """Measures and draws at the steps that the config asks for; changes nothing that trains.

    Args:
        config: The run.
        folder: Run folder.
        state: Models and their EMA, which is what is measured and drawn where it is on.
        tracker: Takes the numbers.
        held_out: Photos for the held-out loss, or None.
        drift: Class images for the drift from the base, or None.
        sampler: Draws pictures.
        parallel: The processes, and the precision of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        state: TrainState,
        tracker: Tracker,
        held_out: Probe | None,
        drift: Probe | None,
        sampler: Sampler,
        parallel: Parallel,
    ) -> None:
        self._config, self._folder, self._state = config, folder, state
        self._tracker, self._sampler = tracker, sampler
        self._held_out, self._drift = held_out, drift
        self._parallel = parallel
        self._base_loss: float | None = None
        self._kept_share: float | None = None
        self._loss: float | None = None
        self._concluded = False
        self._refresh_kept_share()

    @property
    def base_loss(self) -> float | None:
        """Held-out loss of the base model, None without held-out photos."""
        if self._base_loss is None and self._held_out is not None:
            with self._autocast():
                loss = self._held_out.base_loss()
            self._base_loss = self._finite(loss, "the held-out loss of the base model")
        return self._base_loss

    def validation_loss(self) -> float | None:
        """Latest held-out loss of the adapted model; measured now if a resumed run has none yet."""
        if self._loss is None and self._held_out is not None:
            with self.shown_weights(), self._autocast():
                self._loss = self._finite(self._held_out.loss(), "the held-out loss")
        return self._loss

    @property
    def kept_share(self) -> float | None:
        """Share of the update's entries that the layers' levels keep; None without levels."""
        return self._kept_share

    def after(self, step: int) -> None:
        """Do what is due after optimizer step `step`; 0 is the start.

        Raises:
            NonFiniteError: The step made weights that are not finite; nothing was measured.
        """
        every = max(1, self._config.max_train_steps // _RECORDS)
        plan = [
            (self._config.validation_steps, self._validate),
            (every, self._record_allocation),
            (self._config.sample_steps, self._draw),
        ]
        self._refresh_kept_share()
        if any(self._due(step, interval) for interval, _ in plan):
            weights = trainable_parameters(self._state.components)
            require_finite_weights(weights, f"after step {step}", self._parallel)
        # One by one: the first may find that this step is the last.
        for interval, act in plan:
            if self._due(step, interval):
                act(step)

    def _due(self, step: int, every: int | None) -> bool:
        ends = step in (0, self._config.max_train_steps) or self._state.exhausted
        return ends or (every is not None and step % every == 0)

    def shown_weights(self) -> AbstractContextManager[None]:
        """The adapter that is measured, drawn and saved: the average where one is kept.

        After `conclude` it is the best one measured, where a run looks for that.
        """
        if self._concluded and self._state.best is not None:
            return self._state.best.applied()
        return nullcontext() if self._state.ema is None else self._state.ema.applied()

    def conclude(self) -> None:
        """From now on show the adapter that the run keeps."""
        self._concluded = True
        best = self._state.best
        if best is not None:
            self._loss = best.loss if math.isfinite(best.loss) else None

    def _refresh_kept_share(self) -> None:
        if self._state.competition is not None:
            self._kept_share = self._state.competition.kept_share()

    def _record_allocation(self, step: int) -> None:
        if self._state.competition is not None:
            layers = self._state.competition.report()
            if not layers:
                return
            self._tracker.event("allocation", step=step, layers=layers)

    def _validate(self, step: int) -> None:
        numbers: dict[str, float | None] = {}
        if self._held_out is not None:
            numbers["validation_loss_base"] = self.base_loss
        with self.shown_weights(), self._autocast():
            if self._held_out is not None:
                self._loss = self._finite(self._held_out.loss(), f"the held-out loss, step {step},")
                numbers["validation_loss"] = self._loss
                self._judge(step)
            if self._drift is not None:
                drift = self._drift.drift()
                numbers["drift"] = self._finite(drift, f"the drift from the base, step {step},")
        if numbers:
            self._tracker.event("validation", step=step, **numbers)
            self._tracker.remote(numbers, step)

    def _judge(self, step: int) -> None:
        """Let the measurement decide which adapter is kept and whether the run goes on."""
        best = self._state.best
        if best is None:
            return
        loss = math.nan if self._loss is None else self._loss
        # The same number everywhere: all processes must stop at the same step.
        shared = torch.tensor(loss, dtype=torch.float64, device=self._parallel.device)
        best.observe(step, float(self._parallel.mean(shared)))
        if best.exhausted:
            self._tracker.event("early stop", step=step, best_step=best.step, best_loss=best.loss)

    def _finite(self, value: float, what: str) -> float | None:
        """A measurement, or None with a note: one that is not finite does not stop training."""
        if math.isfinite(value):
            return value
        self._tracker.note(f"{what} is {value} and was left out")
        return None

    def _autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._parallel.accelerator.autocast()
        return context

    def _draw(self, step: int) -> None:
        prompts, count = self._config.prompts, self._config.num_validation_images
        # The others help where a forward pass needs them; only the main process writes.
        if not prompts or not (self._parallel.main or self._parallel.shares_forward):
            return
        self._tracker.status("sampling")
        columns, indices = prompts * count, [i for i in range(count) for _ in prompts]
        try:
            with self._drawn(step), evaluating(self._state.components), self._autocast():
                pictures = self._sampler.draw(columns, "sample", indices)
        except Exception as error:
            # A picture is never worth the run; the reason is kept in the log.
            self._tracker.note(f"sampling at step {step} failed and was skipped: {error}")
            return
        if not self._tracker.main:
            return
        rows = [pictures[i * len(prompts) : (i + 1) * len(prompts)] for i in range(count)]
        label = f"step {step:06d}" if step else "base model"
        grid = sheet(rows, [label] * count, prompts, self._side)
        path = self._folder / "samples" / f"step-{step:06d}.png"
        try:
            write_with(path, grid.save, durable=False)
        except OutputError as error:
            self._tracker.note(f"the samples of step {step} were not kept: {error}")

    def _drawn(self, step: int) -> AbstractContextManager[None]:
        """What is drawn: the adapter, and at the start the base that it begins from."""
        return self.shown_weights() if step else adapters_off(self._state.components)

    @property
    def _side(self) -> int:
        return max(_CELL, self._config.resolution)

    def draw_pictures(self) -> list[str]:
        """Write the pictures of the finished run; return their file names."""
        events = read_log(self._folder / "log.jsonl")
        names = ["loss.png"]
        loss_curve(events, self._folder / "loss.png")
        if any(event["event"] == "allocation" for event in events):
            allocation_picture(events, self._folder / "allocation.png")
            names.append("allocation.png")
        sheets = sorted((self._folder / "samples").glob("step-*.png"))
        if sheets:
            timeline = stack_sheets(sheets, self._config.prompts, self._side)
            write_with(self._folder / "samples.png", timeline.save, durable=False)
            names.append("samples.png")
        return names
