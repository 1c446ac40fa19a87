"""Few-shot choice and parting are functions of a seed; splits that overlap are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.vision.data import Data, Split, few_shot, load_task
from snell_diffusion.vision.data.pictures import Arrays
from snell_diffusion.vision.data.splits import check_labels, check_overlap, check_repeats, parted
from tests.vision import data_on_disk as disk


def split(labels: list[int], name: str = "train", first: int = 0) -> Split:
    values = [np.full((4, 4), first + i, np.uint8) for i in range(len(labels))]
    keys = [f"{first + i}" for i in range(len(labels))]
    return Split(name, torch.tensor(labels), keys, Arrays(values))


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_every_class_gets_its_shots(shots: int) -> None:
    whole = split([index % 3 for index in range(60)])
    chosen = few_shot(whole, "abc", shots, seed=0)
    assert chosen.counts(3) == [shots] * 3
    assert set(chosen.keys) <= set(whole.keys)
    for index, key in enumerate(chosen.keys):
        assert chosen.labels[index] == int(key) % 3
        assert np.asarray(chosen.image(index))[0, 0, 0] == int(key)


def test_the_choice_follows_the_seed_and_grows() -> None:
    whole = split([index % 3 for index in range(60)])
    keys = {seed: few_shot(whole, "abc", 4, seed).keys for seed in range(3)}
    assert keys[0] == few_shot(whole, "abc", 4, 0).keys
    assert keys[0] != keys[1] != keys[2]
    assert set(few_shot(whole, "abc", 2, 0).keys) < set(keys[0])


def test_too_few_images_of_a_class_are_named() -> None:
    with pytest.raises(SnellaConfigError, match=r"2 images per class.* fewer: b \(1\), c \(0\)"):
        few_shot(split([0, 0, 1]), "abc", 2, seed=0)


def test_shots_leave_validation_and_test_alone(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 20, "dog": 20})
    config = {"dataset": "image_folder", "data_dir": str(tmp_path), "validation_fraction": 0.2}
    whole = load_task(Data(**config), seed=0)
    tests = set()
    for seed in range(3):
        few = load_task(Data(**config, shots=2, validation_shots=1), seed=seed)
        assert few.train.counts(2) == [2, 2]
        assert few.validation.counts(2) == [1, 1]
        assert set(few.train.keys) <= set(whole.train.keys)
        assert set(few.validation.keys) <= set(whole.validation.keys)
        assert "2 per class" in few.name
        tests.add(tuple(few.test.keys))
    assert tests == {tuple(whole.test.keys)}


def test_validation_shots_need_a_validation_split(tmp_path: Path) -> None:
    disk.vtab_task(tmp_path, "eurosat")
    config = Data(dataset="vtab", data_dir=str(tmp_path), task="eurosat", validation_shots=1)
    with pytest.raises(SnellaConfigError, match="validation_shots has no effect"):
        load_task(config, seed=0, select_on="test")


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80),
    st.sampled_from([(0.2,), (0.2, 0.1), (0.45, 0.45)]),
    st.integers(0, 5),
)
def test_parts_are_disjoint_and_complete(labels: list[int], shares: tuple, seed: int) -> None:
    tensor = torch.tensor(labels)
    parts = parted(tensor, shares, seed)
    assert parts == parted(tensor, shares, seed)
    assert len(parts) == len(shares) + 1
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    for label in set(labels):
        count = labels.count(label)
        sizes = [sum(labels[index] == label for index in part) for part in parts]
        assert sizes[-1] >= 1
        if count > len(shares):
            assert min(sizes) >= 1
        for size, share in zip(sizes, shares, strict=False):
            assert size <= max(1, round(share * count))


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    folder = disk.vtab_task(tmp_path, "eurosat")
    leaked = (folder / "train800.txt").read_text().splitlines()[2]
    with (folder / "test.txt").open("a") as file:
        file.write(leaked)
    with pytest.raises(SnellaConfigError, match=r"1 image\(s\) are in split train and in .* test"):
        load_task(Data(dataset="vtab", data_dir=str(tmp_path), task="eurosat"), seed=0)


def test_equal_files_under_two_names_are_warned_of(tmp_path: Path) -> None:
    folder = disk.vtab_task(tmp_path, "eurosat")
    task = load_task(Data(dataset="vtab", data_dir=str(tmp_path), task="eurosat"), seed=0)
    assert "equal" not in " ".join(task.notes)
    shutil.copy(folder / task.train.keys[0], folder / task.test.keys[1])
    task = load_task(Data(dataset="vtab", data_dir=str(tmp_path), task="eurosat"), seed=0)
    expected = f"1 image(s) of test equal one of train under another name: {task.test.keys[1]}"
    assert expected in " ".join(task.notes)


def test_equal_pictures_in_memory_are_warned_of() -> None:
    first, second = split([0, 1]), split([0, 1], "test", first=1)
    second = Split("test", second.labels, ["x", "y"], second.pictures)
    assert check_overlap([first, second]) == [
        "warning: 1 image(s) of test equal one of train under another name: x (= 1)"
    ]


def test_repeats_within_a_split_are_warned_of() -> None:
    twice = Split("train", torch.tensor([0, 1]), ["a", "a"], split([0, 1]).pictures)
    assert check_repeats(twice) == ["warning: split train lists 1 image(s) twice: a"]
    assert check_repeats(split([0, 1])) == []


def test_labels_out_of_range_and_empty_splits_are_refused() -> None:
    with pytest.raises(SnellaConfigError, match=r"0 to 1, .* 2 classes; these are not: 1 \(2\)"):
        check_labels(split([0, 2]), 2)
    with pytest.raises(SnellaConfigError, match="split test holds no image"):
        check_labels(split([], "test"), 2)


def test_classes_without_images_are_said(tmp_path: Path) -> None:
    disk.vtab_task(tmp_path, "eurosat")
    task = load_task(Data(dataset="vtab", data_dir=str(tmp_path), task="eurosat"), seed=0)
    assert "no training image of these classes: 6, 7, 8, 9" in " ".join(task.summary())


def test_a_split_has_as_many_labels_as_pictures() -> None:
    with pytest.raises(ValueError, match="3 labels, 2 keys and 2 pictures"):
        Split("train", torch.tensor([0, 1, 2]), ["a", "b"], split([0, 1]).pictures)
