"""From which of fourteen photographs is this tile? A small real-image task out of scikit-image.

Each photograph that is bundled with scikit-image is cut into tiles of 48x48 pixels that do not
overlap, made grey, and every tile belongs to one split alone. So no pixel of a test tile was
trained on. It is still an easy kind of test: neighbouring tiles touch, and a class is one
photograph, so that its light, grain and focus tell it as well as what it shows. Read an accuracy
here as "can tell these textures apart", not as recognition of things.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.training.randomness import generator
from snell_diffusion.vision.data.pictures import Arrays, PictureError, read_picture
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import Split, Task, parted

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "cell": "cell.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "tissue": "ihc.png",
}
"""Class -> file. Drawings, text, chessboards and second views of a scene are left out."""

TILE = 48  # pixels
PER_CLASS = 44
_FLAT = 6.0  # standard deviation of grey levels (0 to 255) below which a tile shows nothing


def read(config: Data) -> Task:
    """Cut the tiles, parted by class with `split_seed`.

    Raises:
        SnellaConfigError: scikit-image is not installed, or lacks a photograph.
    """
    folder = _folder()
    tiles: list[np.ndarray] = []
    labels: list[int] = []
    keys: list[str] = []
    missing = []
    for label, (name, file) in enumerate(PHOTOGRAPHS.items()):
        try:
            found = _tiles(read_picture(folder / file), config.split_seed, label)
        except PictureError as error:
            missing.append(f"{file} {error}")
            continue
        tiles += found.values()
        labels += [label] * len(found)
        keys += [f"{name} row {row} column {column}" for row, column in found]
    if missing:
        raise SnellaConfigError(
            f"dataset skimage: {len(missing)} photograph(s) of scikit-image are not in '{folder}': "
            f"{shown(missing)}; install scikit-image 0.25 or newer anew"
        )
    whole = Split("all", torch.tensor(labels, dtype=torch.int64), keys, Arrays(tiles))
    shares = (config.test_fraction, config.validation_fraction)
    test, validation, train = parted(whole.labels, shares, config.split_seed)
    return Task(
        "skimage",
        tuple(PHOTOGRAPHS),
        whole.subset(train, "train"),
        whole.subset(validation, "validation"),
        whole.subset(test, "test"),
        notes=("tiles of one photograph are in all three splits, but no pixel is in two",),
    )


def _folder() -> Path:
    # Found, not imported: its own loader would fetch what is not bundled.
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SnellaConfigError(
            "dataset skimage comes with scikit-image, which is not installed: "
            "pip install 'snell-diffusion[eval]'"
        )
    return Path(spec.origin).parent / "data"


def _tiles(picture: Image.Image, seed: int, label: int) -> dict[tuple[int, int], np.ndarray]:
    """At most PER_CLASS tiles that show something, by place in the grid."""
    grey = np.asarray(picture.convert("L"))
    rows, columns = grey.shape[0] // TILE, grey.shape[1] // TILE
    places = [(row, column) for row in range(rows) for column in range(columns)]
    order = torch.randperm(len(places), generator=generator(seed, "tiles", label)).tolist()
    found: dict[tuple[int, int], np.ndarray] = {}
    for index in order:
        row, column = places[index]
        tile = grey[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        if tile.std() >= _FLAT and len(found) < PER_CLASS:
            found[row, column] = tile.copy()
    return dict(sorted(found.items()))
