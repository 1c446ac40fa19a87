"""Doubles, near doubles and photos that get blown up are named."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from snell_diffusion.diffusion.data import find_photos
from snell_diffusion.diffusion.likeness import duplicates, enlarged, near_duplicates


def noise(seed: int, side: int = 40) -> Image.Image:
    """A picture with large structure, as photos have."""
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def test_equal_bytes_are_doubles(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        noise(seed).save(tmp_path / f"{name}.png")
    photos = find_photos(tmp_path, "x")
    assert duplicates(photos) == ["c.png"]
    assert near_duplicates(photos) == []


def test_another_size_or_compression_looks_alike(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "a.png")
    noise(0).save(tmp_path / "b.jpg", quality=85)
    noise(0).resize((61, 61)).save(tmp_path / "c.png")
    photos = find_photos(tmp_path, "x")
    assert duplicates(photos) == []
    assert near_duplicates(photos) == [("a.png", "b.jpg"), ("a.png", "c.png")]


def test_other_photos_do_not_look_alike(tmp_path: Path) -> None:
    """Mirrored, brighter, or of something else: worth training on."""
    noise(0).save(tmp_path / "a.png")
    ImageOps.mirror(noise(0)).save(tmp_path / "b.png")
    ImageEnhance.Brightness(noise(0)).enhance(1.2).save(tmp_path / "c.png")
    noise(1).save(tmp_path / "d.png")
    assert near_duplicates(find_photos(tmp_path, "x")) == []
    assert near_duplicates([]) == []


def test_small_photos_are_named_with_their_factor(tmp_path: Path) -> None:
    Image.new("RGB", (40, 60)).save(tmp_path / "fine.png")
    Image.new("RGB", (20, 60)).save(tmp_path / "narrow.png")
    photos = find_photos(tmp_path, "x")
    assert enlarged(photos, [(40, 40)]) == ["narrow.png (20x60) 2.00 times"]
    assert enlarged(photos, [(60, 20), (40, 40)]) == []
    assert enlarged(photos, [(64, 64)]) == [
        "fine.png (40x60) 1.60 times",
        "narrow.png (20x60) 3.20 times",
    ]
