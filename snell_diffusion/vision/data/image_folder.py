"""Images in class folders, with or without folders train, val and test around them.

    root/train/<class>/*.jpg   root/val/<class>/*.jpg   root/test/<class>/*.jpg
or  root/<class>/*.jpg, parted by class with `split_seed`.
"""

from collections.abc import Iterable
from pathlib import Path

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.vision.data.listing import Entry, Source, file_splits
from snell_diffusion.vision.data.pictures import SUFFIXES
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import Split, Task, parted

_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read(config: Data) -> Task:
    """Read a folder of class folders.

    Raises:
        SnellaConfigError: No such folder, no classes, fewer than two, or bad images.
    """
    root = Path(config.data_dir or "")
    source = Source(
        f"image folder '{root}'",
        root,
        "a folder for each class with its images in it, either directly or inside folders train, "
        "val and test",
        "sort the images into such folders, or set data_dir to where they are",
    )
    source.require_folder()
    given = {split: root / name for split, names in _NAMES.items() for name in _found(root, names)}
    if given and "train" not in given:
        raise source.error(f"there is {shown(p.name for p in given.values())} but no folder train")
    folders = given or {"train": root}
    classes = tuple(sorted({name for folder in folders.values() for name in _folders(folder)}))
    if len(classes) < 2:
        raise source.error(
            f"at least two class folders are needed in '{folders['train']}', found "
            f"{shown(classes) or 'none'}"
        )
    lists = {
        split: list(_entries(source, root, folder, classes)) for split, folder in folders.items()
    }
    empty = [split for split, entries in lists.items() if not entries]
    if empty:
        raise source.error(f"no image ({', '.join(SUFFIXES)}) in {shown(empty)}")
    splits = {s.name: s for s in file_splits(source, root, lists, config.check_images)}
    return Task(f"image folder {root.name}", classes, *_three(splits, config))


def _found(root: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (root / name).is_dir()][:1]


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _entries(source: Source, root: Path, folder: Path, classes: tuple[str, ...]) -> Iterable[Entry]:
    for name in _folders(folder):
        for path in sorted((folder / name).rglob("*")):
            if path.name.startswith(".") or path.is_dir():
                continue
            if path.suffix.lower() not in SUFFIXES:
                raise source.error(
                    f"'{path}' is no image that is read ({', '.join(SUFFIXES)}): convert or move it"
                )
            yield path.relative_to(root).as_posix(), classes.index(name)


def _three(splits: dict[str, Split], config: Data) -> tuple[Split, Split, Split]:
    """Train, validation and test; those that are not on disk are parted off the training images."""
    lacking = [name for name in ("test", "validation") if name not in splits]
    train = splits["train"]
    shares = [
        config.test_fraction if name == "test" else config.validation_fraction for name in lacking
    ]
    parts = parted(train.labels, shares, config.split_seed)
    for name, part in zip(lacking, parts, strict=False):
        if not part:
            raise SnellaConfigError(
                f"image folder: no class has enough images to part a split {name} off; at least "
                f"{len(lacking) + 1} images of a class are needed"
            )
        splits[name] = train.subset(part, name)
    splits["train"] = train.subset(parts[-1]) if lacking else train
    return splits["train"], splits["validation"], splits["test"]
