"""A run's data set, read and checked before anything is trained."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.vision.data import fgvc, image_folder, skimage_tiles, sklearn_digits, vtab
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import (
    Task,
    absent,
    check_labels,
    check_overlap,
    check_repeats,
    few_shot,
)

LAYOUTS: Mapping[str, Callable[[Data], Task]] = {
    "image_folder": image_folder.read,
    "digits": sklearn_digits.read,
    "skimage": skimage_tiles.read,
}
PUBLISHED: Mapping[str, Callable[[Data, bool], Task]] = {"fgvc": fgvc.read, "vtab": vtab.read}
"""Layouts whose published scripts choose on the test split."""


def load_task(config: Data, seed: int, select_on: str = "validation") -> Task:
    """Read and check a data set, and choose the few-shot images.

    Args:
        config: Which data set, and what is taken of it.
        seed: Seed of the run; it chooses the few-shot images, and nothing else here. Validation and
            test are the same for every seed, except for `validation_shots`.
        select_on: "validation", or "test" to follow the published scripts: the split that choices
            are made on is then the test split itself, and vtab trains on train and validation.

    Raises:
        SnellaConfigError: Something is missing, damaged or contradicts itself; says what is
            expected and how to get it.
    """
    if config.dataset in PUBLISHED:
        task = PUBLISHED[config.dataset](config, select_on == "test")
    elif select_on == "test":
        raise SnellaConfigError(
            f"select_on test follows the published scripts of fgvc and vtab; dataset "
            f"{config.dataset} has none, so choose on validation"
        )
    else:
        task = LAYOUTS[config.dataset](config)
    task = _checked(task)
    if config.shots is not None:
        train = few_shot(task.train, task.classes, config.shots, seed)
        task = replace(task, name=f"{task.name}, {config.shots} per class", train=train)
    if config.validation_shots is not None:
        if task.selects_on_test:
            raise SnellaConfigError("validation_shots has no effect with select_on test")
        count = config.validation_shots
        task = replace(task, validation=few_shot(task.validation, task.classes, count, seed))
    return task


def _checked(task: Task) -> Task:
    notes = []
    for split in task.splits:
        check_labels(split, len(task.classes))
        notes += check_repeats(split)
        lacking = absent(split, task.classes)
        if lacking and split is task.train:
            notes.append(f"warning: no training image of these classes: {shown(lacking)}")
        elif lacking:
            notes.append(f"split {split.name} has no image of these classes: {shown(lacking)}")
    return task.noted(*notes, *check_overlap(task.splits))
