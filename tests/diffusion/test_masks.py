"""Masks are found beside photos, checked with them, and follow every cut."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Search, data_digest, find_photos
from snell_diffusion.diffusion.decoding import open_photo
from snell_diffusion.diffusion.framing import View
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.losses import squared_error
from snell_diffusion.diffusion.masks import loss_weights, read_mask
from snell_diffusion.diffusion.pixels import read_mask_pixels
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.diffusion.views import Draws
from snell_diffusion.errors import SnellaConfigError


def half(width: int = 32, height: int = 24) -> Image.Image:
    """White on the left."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


def photo(path: Path, width: int = 32, height: int = 24) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("name", ["a.mask.png", "masks/a.png", "masks/a.webp", "a.mask.jpg"])
def test_masks_are_found(tmp_path: Path, name: str) -> None:
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.png")
    (tmp_path / "masks").mkdir()
    half().save(tmp_path / name, quality=95)
    first, second = find_photos(tmp_path, "x")
    assert first.path.name == "a.jpg"
    assert first.mask is not None
    assert first.mask.path == tmp_path / name
    assert second.mask is None
    assert data_digest([first, second]) != data_digest([replace(first, mask=None), second])


def test_photos_in_inner_folders_have_theirs(tmp_path: Path) -> None:
    (tmp_path / "inner" / "masks").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    photo(tmp_path / "a.png")
    photo(tmp_path / "inner" / "a.png")
    photo(tmp_path / ".hidden" / "c.png")
    half().save(tmp_path / "inner" / "masks" / "a.png")
    (tmp_path / "inner" / "loop").symlink_to(tmp_path)
    assert [p.path.name for p in find_photos(tmp_path, "x")] == ["a.png"]
    outer, inner = find_photos(tmp_path, "x", Search(recursive=True))
    assert (outer.mask, inner.path) == (None, tmp_path / "inner" / "a.png")
    assert inner.mask is not None


def twice(folder: Path) -> None:
    (folder / "masks").mkdir()
    half().save(folder / "a.mask.png")
    half().save(folder / "masks" / "a.png")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another size": (
        lambda f: half(24, 24).save(f / "a.mask.png"),
        "a.png is 32x24, its mask a.mask.png 24x24: make them equal",
    ),
    "black": (
        lambda f: Image.new("L", (32, 24)).save(f / "a.mask.png"),
        "a.png has a mask a.mask.png that is black everywhere",
    ),
    "broken": (
        lambda f: (f / "a.mask.png").write_text("x"),
        "a.png has a mask a.mask.png that is not a jpg, png or webp file",
    ),
    "alone": (lambda f: half().save(f / "b.mask.png"), "b.mask.png is a mask without a photo"),
    "twice": (twice, "a.png has 2 masks: a.mask.png, a.png"),
}


def test_what_is_transparent_in_a_mask_is_black(tmp_path: Path) -> None:
    """As in a subject that was cut out; in a photo it is white."""
    cut_out = Image.new("RGBA", (32, 24), (255, 255, 255, 0))
    cut_out.paste((255, 255, 255, 255), (0, 0, 16, 24))
    cut_out.save(tmp_path / "a.mask.png")
    picture, _ = read_mask(tmp_path / "a.mask.png")
    assert picture.tobytes() == half().convert("L").tobytes()
    assert open_photo(tmp_path / "a.mask.png").getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("kind", BAD)
def test_bad_masks_are_named(tmp_path: Path, kind: str) -> None:
    photo(tmp_path / "a.png")
    make, message = BAD[kind]
    make(tmp_path)
    with pytest.raises(SnellaConfigError, match=re.escape(message)):
        find_photos(tmp_path, "x")


def test_a_mask_is_cut_and_mirrored_as_its_photo(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    half().save(tmp_path / "a.mask.png")
    (found,) = find_photos(tmp_path, "x")
    left = read_mask_pixels(found, (24, 24), View((0.0, 0.5)))
    assert (left[0, :, :15] > 250).all()
    assert (left[0, :, 17:] < 5).all()
    mirrored = read_mask_pixels(found, (24, 24), View((0.0, 0.5), flip=True))
    assert torch.equal(mirrored, left.flip(-1))
    right = read_mask_pixels(found, (24, 24), View((1.0, 0.5)))
    assert right.float().mean() < left.float().mean()


def test_a_mask_that_changed_is_named(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    half().save(tmp_path / "a.mask.png")
    (found,) = find_photos(tmp_path, "x")
    Image.new("L", (32, 24), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(SnellaConfigError, match=r"mask '.*a.mask.png' holds other bytes than bef"):
        read_mask_pixels(found, (24, 24), View())


def test_photos_are_read_with_their_masks_where_any_has_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photo(tmp_path / f"{name}.png")
    half().save(tmp_path / "a.mask.png")
    config = TrainConfig(instance_data_dir="x", instance_prompt="x", resolution=16)
    draws = Draws(config, "instance", find_photos(tmp_path, "x"), 2, 0, 1)
    pixels = draws.read(1, 0)
    assert pixels.shape == (2, 4, 16, 16)
    white = [bool((mask == 255).all()) for mask in pixels[:, 3]]
    assert sorted(white) == [False, True]


def test_weights_are_the_mask_s_mean_over_each_latent() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :, :3] = 255
    weights = loss_weights(mask, (2, 2), 0.2)
    torch.testing.assert_close(weights, torch.tensor([[[0.8, 0.2], [0.8, 0.2]]]))
    assert torch.equal(loss_weights(torch.full_like(mask, 255), (4, 4), 0.0), torch.ones(1, 4, 4))


def test_errors_are_weighed_means() -> None:
    target = torch.zeros(3, 2, 2, 2)
    answer = torch.tensor([1.0, 3.0]).expand(3, 2, 2, 2)
    mask = torch.ones(3, 1, 2, 2)
    mask[1, ..., 1] = 0.0
    mask[2] = 0.0
    assert squared_error(answer, target, mask).tolist() == [5.0, 1.0, 0.0]
    assert squared_error(answer, target).tolist() == [5.0, 5.0, 5.0]


def found(folder: Path, **changes: bool) -> Photos:
    config = TrainConfig(instance_data_dir=str(folder), instance_prompt="x", **changes)
    return Photos.find(config, RunFolder(config))


def test_masks_count_only_where_asked(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    with pytest.raises(SnellaConfigError, match=r"masked_loss is on, .* put a.mask.png beside"):
        found(tmp_path, masked_loss=True)
    half().save(tmp_path / "a.mask.png")
    config = TrainConfig(instance_data_dir=str(tmp_path), instance_prompt="x")
    unused, used = found(tmp_path), found(tmp_path, masked_loss=True)
    assert unused.instance[0].mask is None
    assert used.instance[0].mask is not None
    assert unused.digest() != used.digest()
    assert "masks: 1 are there, and masked_loss is off" in unused.summary(config, [(16, 16)])
    assert any(line.startswith("masks: 1 of 1") for line in used.summary(config, [(16, 16)]))


def test_photos_whose_white_is_cut_off_are_told(tmp_path: Path) -> None:
    for name, width in (("wide.png", 64), ("near.png", 24)):
        photo(tmp_path / name, width)
        mask = np.zeros((24, width), np.uint8)
        mask[:, :8] = 255
        Image.fromarray(mask).save(tmp_path / name.replace(".png", ".mask.png"))
    photo(tmp_path / "bare.png", 64)
    photos, square, own = found(tmp_path, masked_loss=True), [(16, 16)], [(16, 40), (16, 16)]

    def told(shapes: list[tuple[int, int]], **changes: Any) -> list[str]:
        values = {"instance_data_dir": str(tmp_path), "instance_prompt": "x", "masked_loss": True}
        config = TrainConfig(**{**values, "unmasked_weight": 0.0, **changes})
        return [line for line in photos.summary(config, shapes) if "teach nothing" in line]

    (line,) = told(square)
    assert line.endswith("unmasked_weight is 0: wide.png; crop them by hand around the subject")
    assert told(own) == []
    assert told(square, unmasked_weight=0.1) == []
    assert told(square, center_crop=False, cache_latents=False) == []
