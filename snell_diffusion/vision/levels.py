"""A search over sparsity levels: train each, choose on validation, look at test once."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from snell_diffusion.training.files import remove, write_json, write_text
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.tracking import Event
from snell_diffusion.vision.config import VisionConfig, config_text
from snell_diffusion.vision.data import Inputs, Task
from snell_diffusion.vision.measure import measure
from snell_diffusion.vision.method import level_setting
from snell_diffusion.vision.results import RunResult
from snell_diffusion.vision.run_folder import run_folder
from snell_diffusion.vision.saving import FILES

Train = Callable[[VisionConfig], RunResult]
_COPIED = (*FILES, "log.jsonl", "curve.png", "allocation.png")


def level_config(config: VisionConfig, level: float) -> VisionConfig:
    """The run of one level: its setting among `method_args`, its folder below the search's."""
    setting = level_setting(config.method)
    arguments = [pair for pair in config.method_args if pair.partition("=")[0] != setting]
    folder = None if config.output_dir is None else str(Path(config.output_dir) / f"level-{level}")
    return dataclasses.replace(
        config,
        levels=[],
        method_args=[*arguments, f"{setting}={level}"],
        output_dir=folder,
        resume_from_checkpoint="auto" if config.resume_from_checkpoint else None,
    )


def search(
    config: VisionConfig,
    task: Task,
    train: Train,
    parallel: Parallel,
    on_event: Callable[[Event], None] | None,
) -> RunResult:
    """Train every level of `config.levels`; the best on validation is measured on test and kept.

    Args:
        config: The search.
        task: The images.
        train: A training without a look at the test images.
        parallel: The processes.
        on_event: Told of every level's result.

    Returns:
        The best level's result, with its test measurement and what was tried.
    """
    folder = run_folder(config)
    if folder is not None and parallel.main:
        folder.take()
        write_text(folder.path / "config.yaml", config_text(config))
    parallel.wait()
    tried: dict[float, float] = {}
    best: RunResult | None = None
    for level in config.levels:
        result = dataclasses.replace(train(level_config(config, level)), level=level)
        tried[level] = result.validation.accuracy
        if on_event is not None:
            on_event({"event": "level", "level": level, "validation_accuracy": tried[level]})
        if best is None or result.validation.objective < best.validation.objective:
            best = result
    assert best is not None
    classifier = best.classifier
    inputs = Inputs(task.test, classifier.preprocess, False, config)
    test = measure(classifier.family, classifier.model, inputs, config.eval_batch_size, parallel)
    best = dataclasses.replace(best, test=test, tried=tried)
    return _keep(best, folder.path, parallel) if folder is not None else best


def _keep(best: RunResult, folder: Path, parallel: Parallel) -> RunResult:
    """Copy the best level's files into the search's folder."""
    assert best.output_dir is not None
    best = dataclasses.replace(best, output_dir=folder)
    if parallel.main:
        source = folder / f"level-{best.level}"
        for name in _COPIED:
            remove(folder / name)
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        write_json(folder / "result.json", best.to_json())
    parallel.wait()
    if best.adapter_path is None:
        return best
    return dataclasses.replace(best, adapter_path=folder / best.adapter_path.name)
