"""Checkpoints of a run that goes on, and what is left of one that failed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from snell_diffusion.training.adapter_tensors import trainable_parameters
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import CheckpointError, NonFiniteError, OutputError
from snell_diffusion.training.finite import require_finite_weights
from snell_diffusion.training.loop import TrainState
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.tracking import Tracker


class StateKeeper:
    """Publishes the state of a run, which a later run can go on from.

    Args:
        state: Where the run stands.
        checkpoints: Its checkpoints.
        parallel: The processes; only the main one writes.
        about: Plain JSON values that are kept beside the state: which run it belongs to.
        setting: The setting that keeps more states, for messages.
    """

    def __init__(
        self,
        state: TrainState,
        checkpoints: CheckpointFolder,
        parallel: Parallel,
        about: Callable[[], dict[str, Any]],
        setting: str,
    ) -> None:
        self._state, self._checkpoints, self._parallel = state, checkpoints, parallel
        self._about, self._setting = about, setting
        self._saved: int | None = None

    def save(self, tracker: Tracker) -> Path:
        """Publish the state after the current step, from the main process.

        Raises:
            NonFiniteError: A weight is not finite.
            CheckpointError: The disk refused it; earlier checkpoints are untouched.
            OutputError: The disk does not take the log's line.
        """
        step = self._state.step
        weights = trainable_parameters(self._state.components)
        require_finite_weights(weights, f"after step {step}", self._parallel)
        tensors, state = self._state.pack()
        if self._parallel.main:
            self._checkpoints.save(step, tensors, {**state, **self._about()})
            tracker.event("checkpoint", step=step)
        self._parallel.wait()
        self._saved = step
        return self._checkpoints.path(step)

    def keep_last_good(self, tracker: Tracker) -> str:
        """Save the state before a failed step, if it is sound; say what is kept."""
        if self._saved == self._state.step:
            # The levels are those of the failed step by now.
            return f"The last good state is kept in {self._checkpoints.path(self._saved)}"
        try:
            return f"The last good state is kept in {self.save(tracker)}"
        except (CheckpointError, OutputError) as error:
            return f"The last good state could not be saved: {error}"
        except NonFiniteError:
            steps = self._checkpoints.steps()
            if steps:
                return f"The last good state is kept in {self._checkpoints.path(steps[-1])}"
            return f"No earlier state was saved; set {self._setting} to keep one"
