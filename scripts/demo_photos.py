"""Photos of one subject for the demo: square crops of scikit-image's photograph of a cat.

`skimage.data.chelsea()` is a real photograph (Stefan van der Walt, CC0) that comes with the
package. It is one photograph, so these are crops of it at different positions and zooms, and the
held-out crop shares pixels with the others: the demo's held-out loss says how well a framing that
was never trained on is predicted, not how well another photograph is.
"""

from pathlib import Path

import numpy as np
from PIL import Image

# (left, top, side) in pixels of the 451 x 300 photograph
TRAIN_CROPS = ((80, 0, 300), (95, 0, 300), (110, 0, 300), (97, 10, 280), (104, 4, 290))
HELD_OUT_CROP = (88, 5, 292)
SIDE = 256


def chelsea() -> Image.Image:
    """The whole photograph, 451 x 300 pixels, RGB."""
    try:
        from skimage.data import chelsea as load
    except ImportError as error:
        raise ImportError(
            "the demo's photograph comes with scikit-image: pip install 'snell-diffusion[eval]'"
        ) from error
    return Image.fromarray(np.asarray(load()))


def crop(photo: Image.Image, box: tuple[int, int, int]) -> Image.Image:
    """Square part (left, top, side) of a photo, scaled to SIDE x SIDE pixels."""
    left, top, side = box
    part = photo.crop((left, top, left + side, top + side))
    return part.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write_photos(folder: Path) -> tuple[Path, Path]:
    """Write the crops as PNG and return the folders (photos to train on, held-out photo)."""
    photos, holdout = folder / "photos", folder / "holdout"
    photo = chelsea()
    for target, boxes in ((photos, TRAIN_CROPS), (holdout, (HELD_OUT_CROP,))):
        target.mkdir(parents=True, exist_ok=True)
        for index, box in enumerate(boxes):
            crop(photo, box).save(target / f"chelsea-{index}.png")
    return photos, holdout
