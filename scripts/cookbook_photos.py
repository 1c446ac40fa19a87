"""Training pictures of the cookbook's recipes, made anew from what every installation has.

- pet: the head of the cat in `skimage.data.chelsea()` (a real photograph, CC0), cut out along a
  fixed outline and put on the embedded base's procedural scenes. One photograph has one
  background; a pet's album has several, and that is what this imitates. The embedded base's
  autoencoder has seen crops of this photograph, its text-to-image part has not.
- object: the crops of a cup of coffee of `scripts.demo_photos`.
- style: the embedded base's own pictures, printed in three inks by one fixed filter.

Every folder has the form that `instance_data_dir` wants: pictures, each with a caption.
"""

import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from scripts.demo_photos import write_photos
from scripts.embedded_base.scenes import SCENES

SIDE = 256  # of a pet picture, pixels

# The cat's head in the 451 x 300 photograph, x and y in pixels
HEAD = (
    *((110, 0), (66, 22), (42, 64), (26, 120), (30, 180), (70, 232), (130, 262), (190, 286)),
    *((262, 290), (310, 268), (344, 214), (366, 150), (366, 84), (394, 34), (390, 6), (350, 0)),
)
HEAD_BOX = (22, 0, 398, 294)
SOFT = 23  # pixels: hair and whiskers smaller than this are smoothed away
PET_TOKEN = "<chelsea>"
HEAD_WIDTH, HEAD_LOWER = 226, 4  # of the head, and of its centre below the picture's, pixels
# scene -> words of the caption
PET_SCENES = {
    "white": "on a white background",
    "grass": "on top of green grass",
    "wood": "on a wooden floor",
    "fabric": "on top of pink fabric",
    "rug": "on top of a purple rug",
}
PET_HELD_OUT = {"desert": "in the desert"}

STYLE_PAPER, STYLE_MIDDLE, STYLE_INK = (255, 240, 205), (240, 96, 72), (24, 38, 92)
STYLE_TOKEN = "<print>"
STYLE_HATCH = 6  # pixels from one hatching line to the next
STYLE_NOUNS = ("dog", "teapot", "car", "house", "rabbit", "vase", "duck", "robot")
STYLE_HELD_OUT = ("mushroom", "clock")
STYLE_PLACES = ("on a white background", "in the snow", "on top of pink fabric")


def chelsea() -> Image.Image:
    """The whole photograph of the cat, 451 x 300 pixels, RGB."""
    try:
        from skimage.data import chelsea as load
    except ImportError as error:
        raise ImportError(
            "the cookbook's photographs come with scikit-image: pip install 'snell-diffusion[eval]'"
        ) from error
    return Image.fromarray(np.asarray(load()))


@cache
def _smooth_chelsea() -> Image.Image:
    return ImageOps.autocontrast(chelsea(), cutoff=1).filter(ImageFilter.MedianFilter(SOFT))


def cat_on(scene: str) -> Image.Image:
    """The cat's head on one scene (a key of SCENES), SIDE x SIDE pixels."""
    photo = _smooth_chelsea()
    outline = Image.new("L", photo.size)
    ImageDraw.Draw(outline).polygon(HEAD, fill=255)
    outline = outline.filter(ImageFilter.GaussianBlur(3))
    height = HEAD_WIDTH * (HEAD_BOX[3] - HEAD_BOX[1]) / (HEAD_BOX[2] - HEAD_BOX[0])
    size = (HEAD_WIDTH, round(height))
    head, mask = (
        image.crop(HEAD_BOX).resize(size, Image.Resampling.LANCZOS) for image in (photo, outline)
    )
    pixels = np.clip(SCENES[scene](np.random.default_rng(0)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    picture.paste(head, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2 + HEAD_LOWER), mask)
    return picture


def printed(picture: Image.Image) -> Image.Image:
    """The style: three inks by brightness, and diagonal hatching where the picture is dark."""
    grey = np.asarray(picture.convert("L"), np.float32)
    low, high = np.percentile(grey, [4, 96])
    light = np.clip((grey - low) / max(high - low, 1.0), 0, 1)
    y, x = np.mgrid[0 : grey.shape[0], 0 : grey.shape[1]]
    line = (x + y) % STYLE_HATCH < STYLE_HATCH // 3
    out = np.empty((*grey.shape, 3), np.uint8)
    out[:] = STYLE_PAPER
    out[light < 0.62] = STYLE_MIDDLE
    out[(light < 0.62) & line & (light < 0.5)] = STYLE_INK
    out[light < 0.3] = STYLE_INK
    return Image.fromarray(out)


def write_pet(folder: Path) -> None:
    """Five pictures of the cat in folder/photos, one in folder/holdout."""
    for part, scenes in (("photos", PET_SCENES), ("holdout", PET_HELD_OUT)):
        pictures = (
            (f"cat-{scene}", cat_on(scene), f"a photo of a {PET_TOKEN} cat {words}")
            for scene, words in scenes.items()
        )
        _write(folder / part, pictures)


def write_object(folder: Path) -> None:
    """The demo's crops of a cup of coffee in folder/photos and folder/holdout."""
    write_photos(folder)


def write_style(folder: Path, pipe: Any) -> None:
    """Eight of the base's pictures in the style in folder/photos, two in folder/holdout.

    Args:
        folder: Replaced.
        pipe: The embedded base.
    """
    from scripts.cookbook_draw import draw

    for part, nouns in (("photos", STYLE_NOUNS), ("holdout", STYLE_HELD_OUT)):
        places = [STYLE_PLACES[i % len(STYLE_PLACES)] for i in range(len(nouns))]
        prompts = [f"a photo of a {n} {p}" for n, p in zip(nouns, places, strict=True)]
        pictures = (
            (f"{noun}", printed(picture), f"a {noun} {place} in {STYLE_TOKEN} style")
            for noun, place, picture in zip(nouns, places, draw(pipe, prompts), strict=True)
        )
        _write(folder / part, pictures)


def _write(folder: Path, pictures: Iterable[tuple[str, Image.Image, str]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another version's pictures would be trained on
    folder.mkdir(parents=True)
    for name, picture, caption in pictures:
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", "utf-8")
