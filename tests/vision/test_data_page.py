"""docs/vision_data.md tells the truth: its trees are read, its numbers and settings are real."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from snell_diffusion.vision.config import VisionConfig
from snell_diffusion.vision.data import Data, fgvc, load_task, vtab
from tests.vision import data_on_disk as disk

PAGE = (Path(__file__).parents[2] / "docs" / "vision_data.md").read_text("utf-8")


def tree(first: str) -> list[str]:
    """Paths of the tree on the page whose root is called so."""
    block = re.search(rf"^```text\n{re.escape(first)}\n(.*?)^```", PAGE, re.M | re.S)
    assert block is not None
    stack: list[str] = []
    paths = []
    for line in block[1].splitlines():
        depth, name = re.match(r"([│ ├└─]*)(.+)", line).groups()
        stack = [*stack[: len(depth) // 4 - 1], name]
        paths.append("/".join(stack))
    return paths


def test_the_image_folder_is_read_as_drawn(tmp_path: Path) -> None:
    for number, path in enumerate(p for p in tree("flowers") if p.endswith(".jpg")):
        disk.picture(tmp_path / path, number)
    task = load_task(Data(dataset="image_folder", data_dir=str(tmp_path)), seed=0)
    assert task.classes == ("daisy", "rose")
    assert [split.counts(2) for split in task.splits] == [[2, 1], [1, 1], [1, 1]]


def test_the_fgvc_folders_are_those_that_are_read(tmp_path: Path) -> None:
    drawn = tree("data/fgvc")
    for about in fgvc.TASKS.values():
        assert about.folders[0] in drawn
        if about.images:
            assert f"{about.folders[0]}/{about.images}" in drawn
    disk.fgvc(tmp_path / "CUB_200_2011", "images", 200)
    for path in drawn[1:5]:
        assert (tmp_path / path).exists()
    listed = json.loads((tmp_path / "CUB_200_2011/val.json").read_text())
    data = Data(dataset="fgvc", task="cub", data_dir=str(tmp_path))
    assert len(load_task(data, seed=0).validation) == len(listed)


def test_the_vtab_folder_is_read_as_drawn(tmp_path: Path) -> None:
    disk.vtab_task(tmp_path, "eurosat")
    for path in tree("data/vtab-1k"):
        assert (tmp_path / path).exists()


def test_tasks_and_classes_are_told_as_they_are() -> None:
    for task, about in fgvc.TASKS.items():
        assert re.search(rf"^\| `{task}` \|.*\| {about.classes} \|$", PAGE, re.M)
    for task, classes in vtab.CLASSES.items():
        assert re.search(rf"\b{task}\s+{classes}[,;.]", PAGE)


@pytest.mark.parametrize("dataset, package", [("digits", "sklearn"), ("skimage", "skimage")])
def test_sizes_are_told_as_they_are(dataset: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    task = load_task(Data(dataset=dataset), seed=0)
    train, validation, test = (f"{len(split):,}" for split in task.splits)
    wanted = rf"{train}\s+to\s+train\s+on,\s+{validation}\s+to\s+choose\s+on,\s+{test}\s+to\s+test"
    assert re.search(wanted, PAGE)


def test_settings_of_the_page_exist() -> None:
    known = {item.name for item in dataclasses.fields(VisionConfig)}
    named = set(re.findall(r"`([a-z]+_[a-z_]+)(?:: \w+)?`", PAGE))
    layouts = {"image_folder", "center_crop", "random_resized_crop"}
    assert named - known <= layouts
    assert {item.name for item in dataclasses.fields(Data)} - {"data_dir"} <= {
        *re.findall(r"`([a-z_]+)(?:: \w+)?`", PAGE),
    }
