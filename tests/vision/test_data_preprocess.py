"""Pictures are scaled, cut, mirrored and normalised as the model's image processor says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.randomness import generator
from snell_diffusion.vision.data import Data, Inputs, Preprocess, load_task, read_processor
from snell_diffusion.vision.data.pictures import PictureError, read_picture
from snell_diffusion.vision.data.preprocess import random_box
from tests.vision import data_on_disk as disk

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def of(**settings: object) -> Preprocess:
    return Preprocess.of(Data(**settings), HALF, 16)


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_resize_equals_transformers(resample: int) -> None:
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": resample}
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, **values)
    picture = noise(40, 23)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    found = Preprocess.of(Data(), values, 16).eval(picture)
    assert found.shape == (3, 16, 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_config_wins_over_the_processor() -> None:
    config = Data(image_mean=[0.0] * 3, image_std=[1.0] * 3, interpolation="nearest", resolution=24)
    made = Preprocess.of(config, {**HALF, "resample": 3}, 16)
    assert (made.mean, made.std, made.size) == ((0, 0, 0), (1, 1, 1), 24)
    assert made.resample == Image.Resampling.NEAREST
    assert made.eval(noise(24, 24)).min() >= 0


def test_a_processor_that_does_not_normalise_is_obeyed() -> None:
    made = Preprocess.of(Data(), {**HALF, "do_normalize": False}, 16)
    assert (made.mean, made.std) == ((0, 0, 0), (1, 1, 1))


def test_missing_colour_statistics_are_an_error() -> None:
    with pytest.raises(SnellaConfigError, match="image_mean is neither in the config nor"):
        Preprocess.of(Data(), None, 16)
    with pytest.raises(SnellaConfigError, match="image_std is neither"):
        Preprocess.of(Data(image_mean=[0.5] * 3), {}, 16)


def test_the_processor_of_a_folder_is_read(tmp_path: Path) -> None:
    assert read_processor(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HALF))
    found = read_processor(tmp_path)
    assert found is not None
    assert found["image_mean"] == [0.5] * 3


def test_centre_crop_shows_the_middle() -> None:
    # 64x32: the shorter side at 0.5 is a square of 16 around the centre, shown pixel by pixel.
    picture = noise(64, 32)
    found = of(transform="center_crop", crop_share=0.5).pixels(picture)
    expected = np.asarray(picture)[8:24, 24:40]
    assert (found.permute(1, 2, 0).numpy() == expected).all()


def test_padding_surrounds_the_stored_picture() -> None:
    found = of(padding=4, interpolation="nearest").pixels(noise(8, 8))
    assert found[:, 4:12, 4:12].any()
    found[:, 4:12, 4:12] = 0
    assert not found.any()


def test_training_views_follow_the_generator() -> None:
    made, picture = of(transform="random_resized_crop"), noise(40, 40)
    assert made.varies
    first, again, other = (
        made.pixels(picture, generator(0, "view", epoch, 3)) for epoch in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()
    assert not of().varies


def test_half_of_the_views_are_mirrored() -> None:
    made, picture = of(random_flip=True), noise(16, 16)
    plain, mirrored = made.pixels(picture), made.pixels(picture).flip(-1)
    seen = [made.pixels(picture, generator(0, "view", epoch, 0)) for epoch in range(200)]
    flips = sum(bool((view == mirrored).all()) for view in seen)
    assert sum(bool((view == plain).all()) for view in seen) == 200 - flips
    assert 70 < flips < 130


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (30, 30), (200, 20), (20, 200)])
def test_random_crops_have_the_asked_areas_and_aspects(size: tuple[int, int]) -> None:
    width, height = size
    areas = []
    for epoch in range(300):
        left, top, right, bottom = random_box(size, 0.25, generator(0, "view", epoch, 0))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        ratio = (right - left) / (bottom - top)
        assert 0.65 < ratio < 1.5  # 3/4 to 4/3, and the rounding of small sides
    if max(size) <= 2 * min(size):
        assert min(areas) > 0.2
        assert max(areas) - min(areas) > 0.3
    else:  # too narrow for a quarter of the area: the largest centre crop, 27 x 20
        assert set(areas) == {27 * 20 / 4000}


def test_inputs_are_cached_where_nothing_varies(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 4, "dog": 4})
    config = Data(dataset="image_folder", data_dir=str(tmp_path))
    split = load_task(config, seed=0).train
    inputs = Inputs(split, of(), train=True, config=config)
    first = inputs.pixels([0, 2, 1])
    assert first.shape == (3, 3, 16, 16)
    torch.testing.assert_close(first[1], of().eval(split.image(2)))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert (inputs.pixels([0, 2, 1], epoch=5, seed=7) == first).all()
    uncached = Inputs(split, of(), True, Data(**{**vars(config), "cache_images": False}))
    with pytest.raises(SnellaConfigError, match=r"image '.*png' is missing"):
        uncached.pixels([0])


def test_inputs_vary_by_epoch_seed_and_index_only(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 6, "dog": 6})
    settings = {"dataset": "image_folder", "data_dir": str(tmp_path)}
    config = Data(**settings, transform="random_resized_crop")
    made = Preprocess.of(config, HALF, 16)
    split = load_task(config, seed=0).train
    inputs = Inputs(split, made, train=True, config=config)
    assert inputs.varies
    whole = inputs.pixels([0, 1, 2, 3], epoch=2, seed=1)
    parts = [inputs.pixels([index], epoch=2, seed=1) for index in (3, 2, 1, 0)]
    assert (whole == torch.cat(parts).flip(0)).all()
    assert (whole != inputs.pixels([0, 1, 2, 3], epoch=3, seed=1)).any()
    assert (whole != inputs.pixels([0, 1, 2, 3], epoch=2, seed=2)).any()
    measured = Inputs(split, made, train=False, config=config)
    assert not measured.varies
    assert (measured.pixels([1], epoch=0) == measured.pixels([1], epoch=1)).all()
    assert inputs.labels([2, 0]).tolist() == [split.labels[2], split.labels[0]]


def test_threads_change_nothing(tmp_path: Path) -> None:
    disk.class_folders(tmp_path, {"cat": 8, "dog": 8})
    settings = {"dataset": "image_folder", "data_dir": str(tmp_path)}
    alone, helped = (
        Data(**settings, transform="random_resized_crop", num_workers=n) for n in (0, 3)
    )
    split = load_task(alone, seed=0).train
    made = Preprocess.of(alone, HALF, 16)
    found = [Inputs(split, made, True, c).pixels(range(8), 1, 2) for c in (alone, helped)]
    assert (found[0] == found[1]).all()


def test_deep_grey_and_transparency_become_rgb(tmp_path: Path) -> None:
    deep = np.array([[0, 65535], [32768, 256]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = np.asarray(read_picture(tmp_path / "deep.png"))
    assert found[..., 0].tolist() == [[0, 255], [128, 1]]
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert np.asarray(read_picture(tmp_path / "clear.png"))[..., 1].tolist() == [[255, 0], [0, 0]]
    with pytest.raises(PictureError, match="is missing"):
        read_picture(tmp_path / "none.png")
