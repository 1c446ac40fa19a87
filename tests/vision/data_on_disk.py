"""Small data sets on disk in the layouts that are read: pictures of 12x10 pixels, all different."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from snell_diffusion.vision.data import vtab


def picture(path: Path, number: int, size: tuple[int, int] = (12, 10)) -> None:
    """Write a picture that depends on its number alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(path)


def class_folders(root: Path, counts: Mapping[str, int], first: int = 0) -> None:
    """`counts` pictures in each class folder below `root`."""
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index:03d}.png", first)
            first += 1


def fgvc(folder: Path, images: str, classes: int) -> None:
    """One picture per class and split; classes are numbered 1, 3, 5, ..."""
    number = 0
    for split in ("train", "val", "test"):
        listed = {}
        for label in range(classes):
            key = f"{split}/{label}.png"
            picture(folder / images / key, number, (3, 2))
            listed[key] = 2 * label + 1
            number += 1
        (folder / f"{split}.json").write_text(json.dumps(listed))


def vtab_task(
    root: Path, task: str, counts: Iterable[tuple[str, int]] = (("train800", 6), ("val200", 4))
) -> Path:
    """A task's folder with short lists; labels in turn."""
    folder, number, both = root / task, 0, []
    for name, count in (*counts, ("test", 5)):
        lines = []
        for _ in range(count):
            key = f"images/{name}/{number:06d}.png"
            picture(folder / key, number)
            lines.append(f"{key} {number % vtab.CLASSES[task]}")
            number += 1
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        both += [] if name == "test" else lines
    (folder / "train800val200.txt").write_text("\n".join(both) + "\n")
    return folder
