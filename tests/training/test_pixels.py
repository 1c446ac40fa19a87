"""Pictures of every mode become upright RGB."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from snell_diffusion.training.pixels import open_picture, upright_rgb

FORMATS = ("PNG", "JPEG")


def shown(path: Path, behind: str) -> np.ndarray:
    with open_picture(path, FORMATS) as image:
        found = upright_rgb(image, behind)
    assert found.mode == "RGB"
    return np.asarray(found)


@pytest.mark.parametrize(("behind", "value"), [("white", 255), ("black", 0)])
def test_what_is_transparent_shows_the_colour_behind(
    behind: str, value: int, tmp_path: Path
) -> None:
    """Also where 16-bit grey names one of its values as transparent, here 7 * 256."""
    clear = np.full((2, 2, 4), 100, np.uint8)
    clear[..., 3] = [[255, 0], [255, 0]]
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert shown(tmp_path / "clear.png", behind)[..., 2].tolist() == [[100, value]] * 2
    deep = np.array([[0, 65535], [7 * 256, 32768]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=7 * 256)
    assert shown(tmp_path / "deep.png", behind)[..., 1].tolist() == [[0, 255], [value, 128]]


def test_orientation_is_applied(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn clockwise brings it upright
    picture = Image.fromarray(np.array([[0, 255]], np.uint8))
    picture.save(tmp_path / "turned.png", exif=turned)
    assert shown(tmp_path / "turned.png", "white")[..., 0].tolist() == [[0], [255]]


def test_other_formats_are_not_decoded_and_size_is_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "picture.png", "BMP")
    with pytest.raises(UnidentifiedImageError):
        open_picture(tmp_path / "picture.png", FORMATS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_picture(tmp_path / "picture.png", ("BMP",)).close()
