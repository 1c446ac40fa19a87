"""Classification training from a config to a run folder: `run(config)`.

Order matters: settings, images and folder are checked before the base loads; the base and its
adapters are built before anything on disk is replaced; only then the run begins. Epochs and levels
are chosen on validation images; test images are looked at once, with what was chosen.
"""

import gc

from snell_diffusion.training.parallel.launcher import launcher_pid
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.training.start import end_processes, require_tracker
from snell_diffusion.training.tracking import OnEvent
from snell_diffusion.vision.config import VisionConfig
from snell_diffusion.vision.data import Task, load_task
from snell_diffusion.vision.levels import search
from snell_diffusion.vision.method import find_recipe, level_setting
from snell_diffusion.vision.optimization import start_processes
from snell_diffusion.vision.results import RunResult
from snell_diffusion.vision.run_folder import run_folder
from snell_diffusion.vision.trainer import Trainer

__all__ = ["RunResult", "run"]


def run(
    config: VisionConfig, on_event: OnEvent | None = None, task: Task | None = None
) -> RunResult:
    """Train and measure one classifier, or one for each of `levels`.

    Args:
        config: All settings.
        on_event: Called with every event that log.jsonl gets.
        task: The images, where the caller has read them already (`load_task` with the same
            settings); saves time where many runs share them.

    Raises:
        SnellaError: Bad settings, images, base or checkpoint; nothing was replaced.
        NonFiniteError: The loss or a gradient is not finite; the last good state is kept.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    find_recipe(config.method)
    require_tracker(config.report_to)
    if config.levels:
        level_setting(config.method)
    folder = run_folder(config)
    if folder is not None:
        folder.check()
    if task is None:
        task = load_task(config, config.seed, config.select_on)
    parallel = start_processes(config)
    on_gpu = parallel.device.type == "cuda"
    try:
        with StopRequest(launcher_pid()) as stop:
            if config.levels:

                def train(one: VisionConfig) -> RunResult:
                    return Trainer(one, task, parallel, stop, on_event, test=False).run()

                return search(config, task, train, parallel, on_event)
            return Trainer(config, task, parallel, stop, on_event).run()
    finally:
        end_processes(parallel)
        if on_gpu:
            gc.collect()
