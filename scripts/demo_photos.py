"""Photos of one subject for the demo: square crops of scikit-image's photograph of a cup of coffee.

`skimage.data.coffee()` is a real photograph (Rachel Michetti, CC0) that comes with the package. It
is one photograph, so these are crops of it at different positions and zooms, and the held-out crop
shares pixels with the others: the demo's held-out loss says how well a framing that was never
trained on is predicted, not how well another photograph is.

Each crop has a caption that names the ground the cup stands on: what the caption says of the scene,
the subject's token need not learn.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

# (left, top, side) in pixels of the 600 x 400 photograph
TRAIN_CROPS = ((60, 0, 400), (80, 0, 400), (100, 0, 400), (75, 0, 390), (90, 5, 395))
HELD_OUT_CROP = (68, 2, 396)
CAPTIONS = ("a photo of a sks bowl on a wooden floor", "a sks bowl on a wooden floor")
SIDE = 256


def photograph() -> Image.Image:
    """The whole photograph, 600 x 400 pixels, RGB."""
    try:
        from skimage.data import coffee
    except ImportError as error:
        raise ImportError(
            "the demo's photograph comes with scikit-image: pip install 'snell-diffusion[eval]'"
        ) from error
    return Image.fromarray(np.asarray(coffee()))


def crop(photo: Image.Image, box: tuple[int, int, int]) -> Image.Image:
    """Square part (left, top, side) of a photo, scaled to SIDE x SIDE pixels."""
    left, top, side = box
    part = photo.crop((left, top, left + side, top + side))
    return part.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write_photos(folder: Path) -> tuple[Path, Path]:
    """Write crops and captions; return the folders (photos to train on, held-out photo)."""
    photos, holdout = folder / "photos", folder / "holdout"
    photo = photograph()
    for target, boxes in ((photos, TRAIN_CROPS), (holdout, (HELD_OUT_CROP,))):
        shutil.rmtree(target, ignore_errors=True)  # another version's photos would be trained on
        target.mkdir(parents=True)
        for index, box in enumerate(boxes):
            crop(photo, box).save(target / f"coffee-{index}.png")
            caption = CAPTIONS[index % len(CAPTIONS)]
            (target / f"coffee-{index}.txt").write_text(caption + "\n", "utf-8")
    return photos, holdout
