"""Every layout is read as it is documented, and says what is missing, wanted and how to get it."""

import builtins
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.vision.data import Data, fgvc, load_task, skimage_tiles, vtab
from tests.vision import data_on_disk as disk


def folder(path: Path, **settings: object) -> Data:
    return Data(dataset="image_folder", data_dir=str(path), **settings)


def fgvc_data(path: Path, task: str = "cub", **settings: object) -> Data:
    return Data(dataset="fgvc", data_dir=str(path), task=task, **settings)


def vtab_data(path: Path, task: str = "eurosat", **settings: object) -> Data:
    return Data(dataset="vtab", data_dir=str(path), task=task, **settings)


# -- image folders ---------------------------------------------------------------------------------


def test_class_folders_are_parted_by_class(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 10, "dog": 20})
    task = load_task(folder(tmp_path, validation_fraction=0.2, test_fraction=0.3), seed=0)
    assert task.classes == ("cat", "dog")
    assert task.train.counts(2) == [5, 10]
    assert task.validation.counts(2) == [2, 4]
    assert task.test.counts(2) == [3, 6]
    keys = [*task.train.keys, *task.validation.keys, *task.test.keys]
    assert len(set(keys)) == 30
    for split in task.splits:
        for key, label in zip(split.keys, split.labels.tolist(), strict=True):
            assert key.startswith(task.classes[label])


def test_the_parting_follows_split_seed_and_not_seed(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 10, "dog": 10})
    first, again = (load_task(folder(tmp_path), seed=seed) for seed in (0, 1))
    assert first.test.keys == again.test.keys
    assert first.digest() == again.digest()
    other = load_task(folder(tmp_path, split_seed=1), seed=0)
    assert other.test.keys != first.test.keys
    assert other.digest() != first.digest()


def test_split_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    disk.class_folders(tmp_path / "train", {"cat": 4, "dog": 4})
    disk.class_folders(tmp_path / "val", {"cat": 1, "dog": 2}, first=100)
    disk.class_folders(tmp_path / "test", {"cat": 3, "dog": 1}, first=200)
    task = load_task(folder(tmp_path), seed=0)
    assert [split.counts(2) for split in task.splits] == [[4, 4], [1, 2], [3, 1]]
    assert task.test.keys[0] == "test/cat/000.png"


def test_a_missing_validation_folder_is_parted_off_train(tmp_path: Path) -> None:
    disk.class_folders(tmp_path / "train", {"cat": 10, "dog": 10})
    disk.class_folders(tmp_path / "test", {"cat": 1, "dog": 1}, first=100)
    task = load_task(folder(tmp_path, validation_fraction=0.3), seed=0)
    assert [split.counts(2) for split in task.splits] == [[7, 7], [3, 3], [1, 1]]
    assert all(key.startswith("train/") for key in task.validation.keys)


def test_bad_images_are_all_named(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "cat" / "empty.jpg").touch()
    (tmp_path / "dog" / "text.png").write_text("no picture")
    with pytest.raises(SnellaConfigError) as caught:
        load_task(folder(tmp_path), seed=0)
    assert "2 bad image(s)" in str(caught.value)
    assert "cat/empty.jpg is empty" in str(caught.value)
    assert "dog/text.png is no picture, whatever its name says" in str(caught.value)


def test_a_cut_off_image_is_found_when_pixels_are_checked(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 4, "dog": 4})
    whole = tmp_path / "cat" / "cut.png"
    disk.picture(whole, 77, (64, 64))
    whole.write_bytes(whole.read_bytes()[:3000])
    task = load_task(folder(tmp_path), seed=0)  # its header is fine
    with pytest.raises(SnellaConfigError, match=r"cat/cut.png cannot be decoded"):
        load_task(folder(tmp_path, check_images="pixels"), seed=0)
    split = next(s for s in task.splits if "cat/cut.png" in s.keys)
    with pytest.raises(SnellaConfigError, match=r"image '.*cut.png' cannot be decoded"):
        split.image(list(split.keys).index("cat/cut.png"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "does not exist"),
        (lambda root: disk.class_folders(root, {"cat": 3}), "at least two class folders.*cat"),
        (lambda root: disk.class_folders(root / "test", {"cat": 3}), "test but no folder train"),
        (lambda root: [(root / n).mkdir(parents=True) for n in "ab"], "no image .* in train"),
        (
            lambda root: (
                disk.class_folders(root, {"cat": 3, "dog": 3}),
                (root / "cat" / "notes.txt").write_text("x"),
            ),
            r"notes.txt' is no image that is read",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(SnellaConfigError, match=message) as caught:
        load_task(folder(tmp_path / "data"), seed=0)
    assert "Expected: a folder for each class" in str(caught.value)
    assert "To get it: " in str(caught.value)


# -- FGVC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, name", [(t, n) for t, about in fgvc.TASKS.items() for n in about.folders]
)
def test_fgvc_folders_are_found_by_their_names(tmp_path: Path, task: str, name: str) -> None:
    about = fgvc.TASKS[task]
    disk.fgvc(tmp_path / name, about.images, 1)
    with pytest.raises(SnellaConfigError) as caught:  # one class is too few: it was read
        load_task(fgvc_data(tmp_path, task), seed=0)
    assert f"has {about.classes} classes, but the lists have 1" in str(caught.value)


def test_fgvc_classes_are_ranked(tmp_path: Path) -> None:
    disk.fgvc(tmp_path / "CUB_200_2011", "images", 200)
    task = load_task(fgvc_data(tmp_path), seed=0)
    assert len(task.classes) == 200
    assert task.classes[:3] == ("1", "3", "5")
    assert task.train.labels.tolist() == list(range(200))
    assert [split.name for split in task.splits] == ["train", "validation", "test"]
    assert not task.selects_on_test
    direct = load_task(fgvc_data(tmp_path / "CUB_200_2011"), seed=0)
    assert direct.digest() == task.digest()


def test_fgvc_as_published_trains_on_train_and_chooses_on_test(tmp_path: Path) -> None:
    disk.fgvc(tmp_path / "CUB_200_2011", "images", 200)
    task = load_task(fgvc_data(tmp_path), seed=0, select_on="test")
    assert task.selects_on_test
    assert task.validation is task.test
    assert task.train.keys[0].startswith("train/")
    assert "choices are made on the test split" in " ".join(task.summary())


def test_fgvc_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SnellaConfigError, match=r"'sparrows' is unknown.*cars, cub, dogs"):
        load_task(fgvc_data(tmp_path, "sparrows"), seed=0)
    with pytest.raises(SnellaConfigError) as caught:
        load_task(fgvc_data(tmp_path), seed=0)
    text = str(caught.value)
    assert f"'{tmp_path / 'CUB_200_2011'}' does not exist" in text
    assert "train.json, val.json and test.json" in text
    assert "https://www.vision.caltech.edu/datasets/cub_200_2011/" in text
    disk.fgvc(tmp_path / "CUB_200_2011", "images", 200)
    (tmp_path / "CUB_200_2011" / "images" / "test" / "7.png").unlink()
    with pytest.raises(SnellaConfigError, match=r"1 of 600 listed image\(s\).*: test/7.png"):
        load_task(fgvc_data(tmp_path), seed=0)
    (tmp_path / "CUB_200_2011" / "val.json").unlink()
    with pytest.raises(SnellaConfigError, match=r"val.json' is missing"):
        load_task(fgvc_data(tmp_path), seed=0)


def test_fgvc_names_all_missing_lists_and_images_in_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "CUB_200_2011"
    disk.fgvc(folder, "images", 2)
    (folder / "images").rename(folder / "pictures")
    for name in ("val.json", "test.json"):
        (folder / name).unlink()
    with pytest.raises(SnellaConfigError) as caught:
        load_task(fgvc_data(tmp_path), seed=0)
    assert (
        f"file '{folder / 'val.json'}' is missing; file '{folder / 'test.json'}' is missing; "
        f"'{folder / 'images'}' does not exist. Expected: "
    ) in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "should hold a table image path -> class number"),
        ("{oops", "is not valid JSON"),
        ('{"a.png": "bird"}', "should be whole numbers, got a.png: 'bird'"),
        ('{"a.png": true}', "should be whole numbers, got a.png: True"),
    ],
)
def test_bad_fgvc_lists_are_named(tmp_path: Path, text: str, message: str) -> None:
    disk.fgvc(tmp_path / "CUB_200_2011", "images", 2)
    (tmp_path / "CUB_200_2011" / "test.json").write_text(text)
    with pytest.raises(SnellaConfigError, match=message):
        load_task(fgvc_data(tmp_path), seed=0)


# -- VTAB-1k ---------------------------------------------------------------------------------------


def test_there_are_nineteen_tasks() -> None:
    assert len(vtab.CLASSES) == 19


def test_vtab_validation_protocol_keeps_the_lists_apart(tmp_path: Path) -> None:
    disk.vtab_task(tmp_path, "eurosat")
    task = load_task(vtab_data(tmp_path), seed=0)
    assert [len(split) for split in task.splits] == [6, 4, 5]
    assert not task.selects_on_test
    assert task.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert task.validation.labels.tolist() == [6, 7, 8, 9]
    assert "train800.txt lists 6 images, 800 are usual" in " ".join(task.notes)
    assert load_task(vtab_data(tmp_path / "eurosat"), seed=0).digest() == task.digest()


def test_vtab_as_published_trains_on_both_and_chooses_on_test(tmp_path: Path) -> None:
    disk.vtab_task(tmp_path, "eurosat")
    for name in ("train800.txt", "val200.txt"):
        (tmp_path / "eurosat" / name).unlink()  # it reads the list of both
    task = load_task(vtab_data(tmp_path), seed=0, select_on="test")
    assert len(task.train) == 10
    assert task.validation is task.test
    assert task.selects_on_test


def test_vtab_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SnellaConfigError, match=r"'mnist' is unknown.*cifar, caltech101"):
        load_task(vtab_data(tmp_path, "mnist"), seed=0)
    with pytest.raises(SnellaConfigError) as caught:
        load_task(vtab_data(tmp_path), seed=0)
    text = str(caught.value)
    assert f"'{tmp_path / 'eurosat'}' does not exist" in text
    assert "train800.txt, val200.txt, test.txt with lines of 'path label'" in text
    assert "vtab-1k.tar.gz" in text
    folder = disk.vtab_task(tmp_path, "eurosat")
    (folder / "val200.txt").unlink()
    with pytest.raises(SnellaConfigError, match=r"val200.txt' is missing"):
        load_task(vtab_data(tmp_path), seed=0)


def test_vtab_names_all_missing_lists_and_then_all_bad_images(tmp_path: Path) -> None:
    folder = disk.vtab_task(tmp_path, "eurosat")
    (folder / "images" / "train800" / "000000.png").unlink()
    (folder / "images" / "val200" / "000006.png").unlink()
    (folder / "images" / "val200" / "000007.png").write_text("no picture")
    lists = [folder / name for name in ("val200.txt", "test.txt")]
    kept = [path.read_text() for path in lists]
    for path in lists:
        path.unlink()
    with pytest.raises(SnellaConfigError) as caught:
        load_task(vtab_data(tmp_path), seed=0)
    wanted = f"file '{lists[0]}' is missing; file '{lists[1]}' is missing. Expected: "
    assert wanted in str(caught.value)
    for path, text in zip(lists, kept, strict=True):
        path.write_text(text)
    with pytest.raises(SnellaConfigError) as caught:
        load_task(vtab_data(tmp_path), seed=0)
    text = str(caught.value)
    assert "2 of 15 listed image(s) are missing" in text
    assert "images/train800/000000.png, images/val200/000006.png; 1 bad image(s)" in text


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_list_that_cannot_be_reached_is_not_called_missing(tmp_path: Path) -> None:
    folder = disk.vtab_task(tmp_path, "eurosat")
    (folder / "test.txt").unlink()
    (folder / "test.txt").symlink_to(folder / "test.txt")
    with pytest.raises(SnellaConfigError, match=r"test.txt' cannot be read"):
        load_task(vtab_data(tmp_path), seed=0)


@pytest.mark.parametrize(
    "line, message",
    [
        ("images/x.png", "line 6 'images/x.png'"),
        ("images/x.png -1", "line 6 'images/x.png -1'"),
        ("images/x.png 10", "labels in .*test.txt' should be 0 to 9, got images/x.png 10"),
        ("../x.png 1", r"these paths lead out of .*: \.\./x.png"),
        ("/etc/x.png 1", "these paths lead out of .*: /etc/x.png"),
        ("images/x.png 1", r"1 of 16 listed image\(s\) are missing .*: images/x.png"),
    ],
)
def test_bad_vtab_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    folder = disk.vtab_task(tmp_path, "eurosat")
    with (folder / "test.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SnellaConfigError, match=message):
        load_task(vtab_data(tmp_path), seed=0)


def test_paths_with_blanks_are_read(tmp_path: Path) -> None:
    folder = disk.vtab_task(tmp_path, "eurosat")
    disk.picture(folder / "images" / "a b.png", 99)
    with (folder / "test.txt").open("a") as file:
        file.write("images/a b.png 3\n\n")
    task = load_task(vtab_data(tmp_path), seed=0)
    assert (task.test.keys[-1], task.test.labels[-1].item()) == ("images/a b.png", 3)


# -- sets that come with packages ------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    found = datasets.load_digits()
    task = load_task(Data(dataset="digits"), seed=0)
    assert sum(len(split) for split in task.splits) == 1797
    assert min(task.test.counts(10)) >= 35
    index = int(task.test.keys[5].removeprefix("digit-"))
    assert task.test.labels[5].item() == found.target[index]
    shown = np.asarray(task.test.image(5), np.float64)
    np.testing.assert_allclose(shown[..., 0] * 16 / 255, found.images[index], atol=0.04)
    assert (shown[..., 0] == shown[..., 1]).all()


@pytest.mark.parametrize("dataset, package", [("digits", "sklearn"), ("skimage", "skimage")])
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, dataset: str, package: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name.startswith(package):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(skimage_tiles, "find_spec", lambda name: None)
    with pytest.raises(SnellaConfigError, match=r"not installed: pip install"):
        load_task(Data(dataset=dataset), seed=0)


def test_tiles_of_photographs_share_no_pixel() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    task = load_task(Data(dataset="skimage"), seed=0)
    places: dict[str, set[tuple[int, int]]] = {}
    for split in task.splits:
        for index, key in enumerate(split.keys):
            name, row, column = re.fullmatch(r"(\w+) row (\d+) column (\d+)", key).groups()
            assert name == task.classes[split.labels[index]]
            place = (int(row), int(column))
            assert place not in places.setdefault(name, set())
            places[name].add(place)
    assert len(places) == len(task.classes) == 14
    assert max(map(len, places.values())) <= skimage_tiles.PER_CLASS
    assert min(task.train.counts(14)) >= 16
    grass = Image.open(skimage_tiles._folder() / "grass.png").convert("L")
    index = next(i for i, key in enumerate(task.test.keys) if key.startswith("grass"))
    row, column = (int(n) for n in re.findall(r"\d+", task.test.keys[index]))
    expected = np.asarray(grass)[row * 48 : row * 48 + 48, column * 48 : column * 48 + 48]
    assert (np.asarray(task.test.image(index))[..., 2] == expected).all()


def test_a_photograph_that_is_gone_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(skimage_tiles, "_folder", lambda: tmp_path)
    with pytest.raises(SnellaConfigError, match=r"14 photograph.*astronaut.png is missing"):
        load_task(Data(dataset="skimage"), seed=0)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dataset": "vtab", "task": "cifar"}, "data_dir is missing"),
        ({"dataset": "vtab", "data_dir": "x"}, "task is missing"),
        ({"dataset": "digits", "data_dir": "x"}, "data_dir has no effect"),
        ({"dataset": "digits", "task": "x"}, "task has no effect"),
        ({"dataset": "mnist"}, "Input should be 'image_folder'"),
        ({"image_mean": [0.5]}, "image_mean should have 3 numbers, got 1"),
        ({"image_std": [1, 0, 1]}, "image_std should be above 0"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "must leave something to train on"),
        ({"shots": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(**settings)


def test_choosing_on_test_is_for_the_published_tasks() -> None:
    with pytest.raises(SnellaConfigError, match="follows the published scripts of fgvc and vtab"):
        load_task(Data(dataset="digits"), seed=0, select_on="test")


def test_the_published_settings_alone_do_not_choose_on_test(tmp_path: Path) -> None:
    disk.vtab_task(tmp_path, "eurosat")
    task = load_task(vtab_data(tmp_path, protocol="paper"), seed=0)
    assert not task.selects_on_test
    assert len(task.train) == 6


def test_labels_are_int64(tmp_path: Path) -> None:
    disk.fgvc(tmp_path / "CUB_200_2011", "images", 200)
    listed = json.loads((tmp_path / "CUB_200_2011" / "train.json").read_text())
    task = load_task(fgvc_data(tmp_path), seed=0)
    assert task.train.labels.dtype == torch.int64
    assert len(task.train) == len(listed)
