"""How a run begins and ends, whatever it trains: processes, checkpoint, run folder, trackers."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.checkpoints import Checkpoint
from snell_diffusion.training.config_files import yaml_text
from snell_diffusion.training.config_types import Precision, TrackerName
from snell_diffusion.training.files import write_text
from snell_diffusion.training.parallel import Parallel, start
from snell_diffusion.training.run_folder import RunFolder
from snell_diffusion.training.tracking import OnEvent, Tracker, cut_log

# One process draws class images, reads pictures or writes files while the others wait for it.
_LONGEST_WAIT = timedelta(hours=6)


def require_tracker(report_to: TrackerName) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded.

    Raises:
        SnellaConfigError: Says what to install.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise SnellaConfigError(
            f"report_to {report_to} needs a package that is not installed: pip install {report_to}"
        )


def start_processes(
    precision: Precision, report_to: TrackerName, output_dir: str | None
) -> Parallel:
    """Device, precision and processes, checked against what the launcher asked for.

    Args:
        precision: Of the run.
        report_to: Its tracker.
        output_dir: Its folder, below which the tracker writes; None for a run that writes nothing.

    Raises:
        SnellaConfigError: A precision that this device does not run, or another number of processes
            or another strategy than the launcher was asked for.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise SnellaConfigError("mixed_precision fp16 needs a GPU; use bf16 or no on the CPU")
    written = None if output_dir is None else ProjectConfiguration(output_dir, f"{output_dir}/logs")

    def make_accelerator(cpu: bool) -> Accelerator:
        return Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with=None if report_to == "none" else report_to,
            project_config=written,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
        )

    return start(make_accelerator)


def end_processes(parallel: Parallel) -> None:
    """Close the trackers; another run in this process may use another precision."""
    parallel.accelerator.end_training()
    AcceleratorState._reset_state()


def find_checkpoint(
    folder: RunFolder | None, parallel: Parallel, warn: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint that a run continues from; see `RunFolder.find_checkpoint`.

    The main process first: it may have to put back what a killed run left half renamed.

    Raises:
        CheckpointError: There is none, or the one named is damaged.
    """
    if folder is None:
        return None
    if not parallel.main:
        parallel.wait()
    try:
        return folder.find_checkpoint(warn)
    finally:
        # Also after an error: the others then find its reason, and not a lost connection.
        if parallel.main:
            parallel.wait()


def open_run(
    project: str,
    values: Mapping[str, Any],
    folder: RunFolder | None,
    parallel: Parallel,
    *,
    steps: int,
    resumed: int | None,
    notes: Sequence[str],
    on_event: OnEvent | None,
    quiet: bool = False,
) -> Tracker:
    """Take the run folder: the first writes of the run.

    Args:
        project: What TensorBoard or W&B call runs of this kind.
        values: Every setting as a plain value; `report_to` names the tracker.
        folder: Of the run; None writes nothing.
        parallel: The processes; only the main one writes.
        steps: Optimizer steps of the whole run.
        resumed: The step that a resumed run goes on from; later lines of its log go. None for a
            new run.
        notes: Lines for the user.
        on_event: Called with every event.
        quiet: Show nothing on the screen.

    Raises:
        SnellaConfigError: Another run took the folder while this one was loading.
        OutputError: The disk does not let us.
    """
    path = None if folder is None else folder.path
    if folder is not None and parallel.main:
        folder.take()
        cut_log(folder.path / "log.jsonl", -1 if resumed is None else resumed)
        write_text(folder.path / "config.yaml", yaml_text(values))
    parallel.wait()
    remote = _remote(project, values, parallel)
    tracker = Tracker(path, steps, on_event, remote, parallel.main, quiet)
    tracker.status("preparing", step=resumed or 0)
    for note in notes:
        tracker.note(note)
    return tracker


def _remote(
    project: str, values: Mapping[str, Any], parallel: Parallel
) -> Callable[[dict[str, float], int], None] | None:
    """Start TensorBoard or W&B through accelerate, where one was asked for."""
    if values["report_to"] == "none":
        return None
    plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in values.items()}
    accelerator = parallel.accelerator
    accelerator.init_trackers(project, config=plain)
    return lambda numbers, step: accelerator.log(numbers, step=step)
