"""Photos come out upright, square and RGB, and bad ones are named before anything else happens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snell_diffusion.diffusion.data import Search, find_photos
from snell_diffusion.diffusion.decoding import MAX_PIXELS, open_photo
from snell_diffusion.diffusion.likeness import duplicates, near_duplicates
from snell_diffusion.errors import SnellaConfigError

# How a camera stores a scene for each EXIF orientation: the operation that undoes the display's.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def scene() -> Image.Image:
    """32 x 48, every corner another colour."""
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[:24, :16], pixels[:24, 16:] = (250, 0, 0), (0, 250, 0)
    pixels[24:, :16], pixels[24:, 16:] = (0, 0, 250), (250, 250, 250)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_orientation_is_honoured(tmp_path: Path, orientation: int, suffix: str) -> None:
    operation = STORED[orientation]
    stored = scene() if operation is None else scene().transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    stored.save(path, exif=exif, quality=95)
    upright = open_photo(path)
    assert upright.size == (32, 48)
    for place in ((4, 4), (28, 4), (4, 44), (28, 44)):
        np.testing.assert_allclose(upright.getpixel(place), scene().getpixel(place), atol=12)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    rgba.putpixel((10, 10), (200, 0, 0, 255))
    rgba.save(tmp_path / "a.png")
    rgba.convert("LA").save(tmp_path / "b.png")
    rgba.quantize(4).save(tmp_path / "c.png", transparency=0)
    for name in "abc":
        assert open_photo(tmp_path / f"{name}.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_photo(tmp_path / "a.png").getpixel((10, 10)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 0x8000, np.uint16))
    else:
        image = Image.new("RGB", (20, 20), (128, 128, 128)).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    found = open_photo(path)
    assert found.mode == "RGB"
    if mode != "1":
        np.testing.assert_allclose(np.asarray(found).mean(), 128, atol=4)


def cut(path: Path, name: str = "good.jpg") -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path.parent / name)
    whole = (path.parent / name).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def huge(path: Path) -> None:
    Image.new("1", (10_000, 5_001)).save(path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.jpg": (lambda p: p.write_bytes(b""), "is empty"),
    "text.png": (lambda p: p.write_text("hello"), "is not a jpg, png or webp file"),
    "page.jpg": (lambda p: p.write_text("<html></html>"), "is not a jpg, png or webp file"),
    "renamed.png": (lambda p: scene().save(p, "TIFF"), "is not a jpg, png or webp file"),
    "cut.jpg": (cut, "cannot be decoded"),
    "cut.png": (lambda p: cut(p, "good.png"), "cannot be decoded"),
    "huge.png": (huge, "is 10000x5001, more than 50 million pixels"),
    "thin.png": (lambda p: Image.new("RGB", (4000, 1)).save(p), "is 4000x1, below 16 pixels"),
    "strip.png": (
        lambda p: Image.new("1", (20_000, 16)).save(p),
        "is 20000x16, more than 10 times as long",
    ),
    "dangling.png": (lambda p: p.symlink_to("nowhere.png"), "is missing, or a link that leads"),
    "folder.png": (lambda p: p.mkdir(), "is not a regular file"),
    "phone.heic": (lambda p: p.write_bytes(b"x"), "is not jpg, png or webp"),
    "moving.gif": (lambda p: scene().save(p), "is not jpg, png or webp"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    write, reason = BAD[name]
    write(tmp_path / name)
    with pytest.raises(SnellaConfigError, match=rf"1 bad file\(s\) in .*{name} {reason}"):
        find_photos(tmp_path, "a cat")


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    for name in ("empty.jpg", "text.png"):
        BAD[name][0](tmp_path / name)
    scene().save(tmp_path / "fine.png")
    with pytest.raises(SnellaConfigError, match=r"2 bad file\(s\).*empty.jpg.*; text.png"):
        find_photos(tmp_path, "a cat")


def test_no_photos_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(SnellaConfigError, match="holds no jpg, png or webp file"):
        find_photos(tmp_path, "x")
    with pytest.raises(SnellaConfigError, match="nowhere' does not exist or is not a folder"):
        find_photos(tmp_path / "nowhere", "x")


def test_more_photos_than_the_limit_are_refused_unopened(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_text("no picture")
    with pytest.raises(SnellaConfigError, match="holds 4 photos, at most 3 are taken"):
        find_photos(tmp_path, "x", Search(most=3))


def test_pictures_in_pairs_are_photos(tmp_path: Path) -> None:
    """Some cameras put a preview behind the photo (MPO); that is no animation."""
    scene().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[scene()], quality=95)
    assert len(find_photos(tmp_path, "x")) == 1


def test_real_photos(dreambooth: Callable[[str], Path]) -> None:
    photos = find_photos(dreambooth("dog6"), "a photo of a sks dog")
    assert len(photos) == 5
    assert duplicates(photos) == near_duplicates(photos) == []
    for photo in photos:
        assert photo.size == open_photo(photo.path).size[::-1]


def test_limit_is_below_the_library_s_own() -> None:
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS
