"""The nineteen VTAB-1k tasks in the layout of the SSF and SNELL repositories.

A folder per task with images and lists: train800.txt, val200.txt, train800val200.txt, test.txt,
lines of `path label`.
"""

from pathlib import Path

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.vision.data.listing import Entry, Source, file_splits
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import Task

CLASSES = {
    # natural
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    # specialized
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    # structured
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
"""Task folder -> number of classes."""

_VALIDATION = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}
_PAPER = {"train": "train800val200.txt", "test": "test.txt"}
_LINES = {"train800.txt": 800, "val200.txt": 200, "train800val200.txt": 1000}


def read(config: Data, select_on_test: bool) -> Task:
    """Read one of the nineteen tasks.

    Args:
        config: The run.
        select_on_test: Train on train and validation, and let the test split be the one that is
            chosen on, as published.

    Raises:
        SnellaConfigError: Unknown task, missing folder or list, bad lines, missing or bad images.
    """
    name = config.task or ""
    if name not in CLASSES:
        raise SnellaConfigError(
            f"task '{name}' is unknown in dataset vtab; known: {', '.join(CLASSES)}"
        )
    data_dir = Path(config.data_dir or "")
    folder = data_dir if data_dir.name == name else data_dir / name
    files = _PAPER if select_on_test else _VALIDATION
    source = Source(
        f"VTAB-1k task {name}",
        folder,
        f"data_dir = the folder that holds '{name}', and in that the images and "
        f"{', '.join(files.values())} with lines of 'path label', paths from '{name}'",
        "the prepared vtab-1k.tar.gz that the README of https://github.com/dongzelian/SSF links",
    )
    source.require_folder()
    source.require_lists(files.values())
    lists = {split: _read_list(source, file) for split, file in files.items()}
    classes = CLASSES[name]
    for split, entries in lists.items():
        wrong = [f"{key} {label}" for key, label in entries if not 0 <= label < classes]
        if wrong:
            raise source.error(
                f"labels in '{folder / files[split]}' should be 0 to {classes - 1}, got "
                f"{shown(wrong)}"
            )
    notes = [
        f"warning: {files[split]} lists {len(entries)} images, {_LINES[files[split]]} are usual"
        for split, entries in lists.items()
        if len(entries) != _LINES.get(files[split], len(entries))
    ]
    splits = {s.name: s for s in file_splits(source, folder, lists, config.check_images)}
    if select_on_test:
        notes.append("warning: trained on train and validation, chosen on test, as published")
    return Task(
        f"vtab {name}",
        tuple(map(str, range(classes))),
        splits["train"],
        splits["test" if select_on_test else "validation"],
        splits["test"],
        selects_on_test=select_on_test,
        notes=tuple(notes),
    )


def _read_list(source: Source, file: str) -> list[Entry]:
    entries, wrong = [], []
    for number, line in enumerate(source.read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if path and label.isdecimal():
            entries.append((path.strip(), int(label)))
        else:
            wrong.append(f"line {number} '{line[:60]}'")
    if wrong:
        raise source.error(
            f"'{source.folder / file}' should have lines of 'path label', label a whole number; "
            f"{shown(wrong)}"
        )
    if not entries:
        raise source.error(f"'{source.folder / file}' lists no image")
    return entries
