"""Photos fill their shape, and what SDXL is told about the cut is the cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.framing import (
    View,
    cut,
    enlargement,
    fit,
    geometry,
    nearest,
    shapes,
    to_unit,
)
from snell_diffusion.errors import SnellaConfigError


def scene() -> Image.Image:
    """32 x 48, every corner another colour."""
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[:24, :16], pixels[:24, 16:] = (250, 0, 0), (0, 250, 0)
    pixels[24:, :16], pixels[24:, 16:] = (0, 0, 250), (250, 250, 250)
    return Image.fromarray(pixels)


def plan(**changes: object) -> TrainConfig:
    return TrainConfig(instance_data_dir="x", instance_prompt="x", **changes)


def test_a_square_is_the_centre_scaled() -> None:
    square = to_unit(fit(scene(), (16, 16), View()))
    assert square.shape == (3, 16, 16)
    assert square.dtype == torch.float32
    corners = square[:, (0, 0, 15, 15), (0, 15, 0, 15)].T.add(1).mul(127.5)
    expected = [scene().getpixel(p) for p in ((0, 8), (31, 8), (0, 39), (31, 39))]
    np.testing.assert_allclose(corners, expected, atol=1.5)


def test_crop_and_flip() -> None:
    shape = (32, 32)
    top, bottom = fit(scene(), shape, View((0, 0))), fit(scene(), shape, View((1, 1)))
    assert top[0].max() > 240  # red is above
    assert bottom[2].float().mean() > top[2].float().mean()  # blue and white are below
    flipped = fit(scene(), shape, View(flip=True))
    assert torch.equal(flipped, fit(scene(), shape, View()).flip(-1))
    assert to_unit(flipped).abs().max() <= 1


def test_a_photo_of_the_shape_is_left_alone() -> None:
    pixels = fit(scene(), (48, 32), View())
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(np.array(scene())))
    assert geometry((48, 32), (48, 32), View()).tolist() == [48, 32, 0, 0, 48, 32]


def gradient(height: int, width: int) -> Image.Image:
    """Red says the column, green the row, each from 0 to 250."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.rint(columns * 250 / (width - 1))
    pixels[..., 1] = np.rint(rows * 250 / (height - 1))
    return Image.fromarray(pixels)


SIDES = st.integers(32, 90)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.sampled_from([(16, 16), (16, 24), (24, 12)]), st.booleans(), st.data())
def test_geometry_is_where_the_pixels_come_from(
    height: int, width: int, shape: tuple[int, int], flip: bool, data: st.DataObject
) -> None:
    """The colours of a picture say where in the scaled photo it was cut."""
    crop = data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1)))
    view, size = View(crop, flip), (height, width)
    told = geometry(size, shape, view)
    assert told.dtype == torch.float32
    assert told[[0, 1, 4, 5]].tolist() == [height, width, *shape]
    pixels = fit(gradient(height, width), shape, view).float()
    scale = enlargement(size, shape)
    shown = pixels.flip(-1) if flip else pixels
    first_column = shown[0, :, 0].mean() / 250 * (width * scale - 1)
    first_row = shown[1, 0].mean() / 250 * (height * scale - 1)
    left = cut(size, shape, crop).scaled[1] - shape[1] - told[3] if flip else told[3]
    assert abs(first_row - told[2]) < 1.5
    assert abs(first_column - left) < 1.5


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 500), st.integers(16, 500), st.sampled_from([16, 64, 512]))
def test_cuts_lie_inside_the_scaled_photo(height: int, width: int, side: int) -> None:
    for crop in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.7)):
        where = cut((height, width), (side, side), crop)
        for offset, scaled in zip((where.top, where.left), where.scaled, strict=True):
            assert 0 <= offset <= scaled - side


def test_one_square_without_buckets() -> None:
    assert shapes(plan(resolution=64), 8) == [(64, 64)]


@pytest.mark.parametrize("resolution, multiple, step", [(512, 8, 64), (1024, 32, 64), (64, 8, 8)])
def test_buckets_have_about_the_pixels_of_the_square(
    resolution: int, multiple: int, step: int
) -> None:
    found = shapes(plan(resolution=resolution, aspect_ratio_buckets="auto"), multiple)
    assert len(set(found)) == len(found) > 5
    assert (resolution, resolution) in found
    for height, width in found:
        assert height % step == width % step == 0
        assert 0.75 < height * width / resolution**2 < 1.34


def test_the_step_of_buckets_is_a_multiple_of_what_the_base_needs() -> None:
    found = shapes(plan(resolution=512, aspect_ratio_buckets="auto", bucket_step=40), 16)
    assert all(height % 32 == width % 32 == 0 for height, width in found)
    assert any(height % 64 for height, _ in found)


def test_buckets_can_be_given() -> None:
    given_shapes = plan(aspect_ratio_buckets="48,32;32,48")
    assert shapes(given_shapes, 16) == [(48, 32), (32, 48)]
    with pytest.raises(SnellaConfigError, match="multiples of 32 pixels for this base, got 48,32"):
        shapes(given_shapes, 32)


def test_the_nearest_shape_is_that_of_the_aspect_ratio() -> None:
    among = [(64, 64), (80, 48), (48, 80)]
    for size, expected in (((500, 510), 0), ((300, 190), 1), ((700, 1000), 2)):
        assert nearest(size, among) == among[expected]
