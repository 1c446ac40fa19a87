"""The five fine-grained tasks in the layout of VPT: lists in JSON beside the images.

`train.json`, `val.json` and `test.json` map image path -> class; the classes' numbers need not be
contiguous and are ranked, as the published loader ranks them (github.com/KMnP/vpt).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.vision.data.listing import Entry, Source, file_splits
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import Task

_FILES = {"train": "train.json", "validation": "val.json", "test": "test.json"}


@dataclass(frozen=True)
class Collection:
    """One task of the five.

    Attributes:
        title: Its data set.
        folders: Names that its folder has been seen under.
        images: Folder of the images below it; "" where the paths start from the folder itself.
        classes: How many there are.
        home: Where the images are offered.
    """

    title: str
    folders: tuple[str, ...]
    images: str
    classes: int
    home: str


TASKS = {
    "cub": Collection(
        "CUB-200-2011",
        ("CUB_200_2011",),
        "images",
        200,
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    ),
    "nabirds": Collection(
        "NABirds",
        ("nabirds", "NABirds"),
        "images",
        555,
        "https://dl.allaboutbirds.org/nabirds",
    ),
    "flowers": Collection(
        "Oxford Flowers 102",
        ("OxfordFlowers", "OxfordFlower"),
        "",
        102,
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "cars": Collection(
        "Stanford Cars",
        ("StanfordCars", "Stanford-cars", "stanford_cars"),
        "",
        196,
        "https://github.com/KMnP/vpt#datasets-preperation (cars_train and cars_test)",
    ),
    "dogs": Collection(
        "Stanford Dogs",
        ("StanfordDogs", "Stanford-dogs", "stanford_dogs"),
        "Images",
        120,
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
    ),
}


def read(config: Data, select_on_test: bool) -> Task:
    """Read one of the five tasks.

    Args:
        config: The run.
        select_on_test: Let the test split be the one that is chosen on, as published.

    Raises:
        SnellaConfigError: Unknown task, missing folder or list, bad lines, missing or bad images.
    """
    name = config.task or ""
    if name not in TASKS:
        raise SnellaConfigError(f"task '{name}' is unknown in dataset fgvc; known: {shown(TASKS)}")
    about = TASKS[name]
    folder = _folder(Path(config.data_dir or ""), about)
    root = folder / about.images
    where = f"'{about.images}'" if about.images else "the folder itself"
    source = Source(
        f"FGVC task {name} ({about.title})",
        folder,
        f"data_dir = that folder or the one around it, with train.json, val.json and test.json in "
        f"it (image path -> class, paths from {where})",
        f"the images from {about.home}, the lists from the link 'FGVC' in the README of "
        "https://github.com/KMnP/vpt",
    )
    source.require_folder()
    source.require_lists(_FILES.values(), root)
    raw = {split: _read_list(source, file) for split, file in _FILES.items()}
    numbers = sorted({label for found in raw.values() for label in found.values()})
    if len(numbers) != about.classes:
        raise source.error(
            f"{about.title} has {about.classes} classes, but the lists have {len(numbers)} "
            f"different ones ({shown(numbers[:3])} to {numbers[-1] if numbers else '-'})"
        )
    rank = {number: place for place, number in enumerate(numbers)}
    lists: dict[str, list[Entry]] = {
        split: [(key, rank[label]) for key, label in found.items()] for split, found in raw.items()
    }
    train, validation, test = file_splits(source, root, lists, config.check_images)
    task = Task(f"fgvc {name}", tuple(map(str, numbers)), train, validation, test)
    if not select_on_test:
        return task
    note = "warning: choices are made on the test split, as published"
    return replace(task, validation=task.test, selects_on_test=True, notes=(note,))


def _folder(data_dir: Path, about: Collection) -> Path:
    """The task's folder: data_dir itself where the lists are in it, else a known name below it."""
    if (data_dir / _FILES["train"]).exists():
        return data_dir
    below = [data_dir / name for name in about.folders if (data_dir / name).is_dir()]
    if below:
        return below[0]
    return data_dir if data_dir.name in about.folders else data_dir / about.folders[0]


def _read_list(source: Source, file: str) -> dict[str, int]:
    """Image path -> class number."""
    try:
        found = json.loads(source.read_text(file))
    except json.JSONDecodeError as error:
        raise source.error(f"file '{source.folder / file}' is not valid JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise source.error(
            f"file '{source.folder / file}' should hold a table image path -> class number"
        )
    wrong = [f"{key}: {label!r:.40}" for key, label in found.items() if not _is_number(label)]
    if wrong:
        raise source.error(
            f"classes in '{source.folder / file}' should be whole numbers, got {shown(wrong)}"
        )
    return {key: int(label) for key, label in found.items()}


def _is_number(label: object) -> bool:
    if isinstance(label, bool):
        return False
    return isinstance(label, int) or (isinstance(label, str) and label.isdecimal())
