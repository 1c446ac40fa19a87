"""Pictures and numbers for the documentation: labelled grids, provenance, scores."""

import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data import BACKGROUNDS, CLASSES, COLORS, NATURAL, Composite, sha256_of
from .vae import HELD_OUT_PHOTO, PHOTOS, data_folder

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "pillow", "scikit-image")


def class_grid() -> list[Composite]:
    """Every class twice: in its own colours, then in a colour word; backgrounds rotate.

    Colour words are chosen so that the combination is held out of training where one exists.
    """
    colors, backgrounds = tuple(COLORS), tuple(BACKGROUNDS)
    plain, colored = [], []
    for k, noun in enumerate(CLASSES):
        plain.append(Composite(noun, NATURAL, backgrounds[k % len(backgrounds)]))
        pool = [Composite(noun, c, b) for b in backgrounds for c in colors]
        unseen = [w for w in pool if w.held_out]
        colored.append(unseen[k % len(unseen)])
    return plain + colored


def draw_grid(x: Tensor, whats: list[Composite], path: Path, columns: int = 10) -> None:
    """Pictures (B, 3, 64, 64) in [-1, 1], pixels doubled, with what was asked for below."""
    cell, label = 130, 26
    font = ImageFont.load_default(10)
    rows = -(-len(whats) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + label)), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = ((x.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    for k, (image, what) in enumerate(zip(pixels, whats, strict=True)):
        left, top = k % columns * cell, k // columns * (cell + label)
        sheet.paste(Image.fromarray(image).resize((128, 128), Image.NEAREST), (left, top))
        color = "" if what.color == NATURAL else what.color + " "
        draw.text((left + 2, top + cell - 1), color + what.noun, fill="black", font=font)
        draw.text((left + 2, top + cell + 11), what.background, fill="gray", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def provenance(font: Path) -> dict:
    """SHA-256 digests of everything that went in, and package versions."""
    folder = data_folder()
    return {
        "font": {"name": font.name, "sha256": sha256_of(font)},
        "photos": {name: sha256_of(folder / name) for name in PHOTOS},
        "held_out_photo": {"name": HELD_OUT_PHOTO, "sha256": sha256_of(folder / HELD_OUT_PHOTO)},
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }
