"""The backgrounds: one function per scene, each a few lines of noise, gradients and rectangles.

A scene takes a numpy Generator and returns (64, 64, 3) float in about [0, 255], not yet clipped.
"""

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, width and height of every picture


def _noise(rng: np.random.Generator, cells_y: int, cells_x: int) -> np.ndarray:
    """Smooth noise in about [-1, 1], (64, 64), with that many bumps per side."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells_y, cells_x)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.BICUBIC))


def _vertical(top: tuple[int, ...], bottom: tuple[int, ...]) -> np.ndarray:
    """A vertical gradient, (64, 64, 3) float32 in [0, 255]."""
    t = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    row = (1 - t) * np.array(top, np.float32) + t * np.array(bottom, np.float32)
    return np.broadcast_to(row, (SIZE, SIZE, 3)).copy()


def _below(image: np.ndarray, ground: np.ndarray, horizon: np.ndarray) -> np.ndarray:
    """Put `ground` under a horizon line given per column, in rows; softened over 1.5 rows."""
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    mask = np.clip((rows - horizon[None, :]) / 1.5, 0, 1)[..., None]
    return image * (1 - mask) + ground * mask


def _snow(rng):
    horizon = 26 + rng.uniform(-4, 4) + 3 * _noise(rng, 3, 4)[0]
    ground = _vertical((236, 242, 252), (214, 226, 246)) + 8 * _noise(rng, 5, 4)[..., None]
    return _below(_vertical((150, 184, 222), (196, 214, 236)), ground, horizon)


def _beach(rng):
    shore = 32 + rng.uniform(-4, 4) + 2 * _noise(rng, 3, 4)[0]
    sea = np.full(SIZE, 18 + rng.uniform(-3, 3), np.float32)
    image = _vertical((110, 190, 246), (170, 220, 250))
    image = _below(image, _vertical((10, 110, 170), (90, 214, 214)), sea)
    sand = _vertical((250, 226, 160), (226, 184, 112)) + 7 * _noise(rng, 16, 16)[..., None]
    return _below(image, sand, shore)


def _grass(rng):
    blades = 20 * _noise(rng, 10, 32) + 10 * _noise(rng, 4, 4)
    return _vertical((88, 176, 50), (56, 146, 36)) + blades[..., None] * [0.9, 1.0, 0.5]


def _night(rng):
    image = _vertical((8, 8, 34), (36, 34, 92)) + 6 * _noise(rng, 4, 4)[..., None]
    for _ in range(rng.integers(14, 26)):
        y, x = rng.integers(0, SIZE - 1, 2)
        image[y : y + rng.integers(1, 3), x : x + rng.integers(1, 3)] += rng.uniform(90, 200)
    return image


def _bricks(rng, width, height, brick, mortar, spread):
    picture = Image.new("RGB", (SIZE, SIZE), mortar)
    draw = ImageDraw.Draw(picture)
    shift = rng.integers(0, width)
    for row, y in enumerate(range(-int(rng.integers(0, height)), SIZE, height)):
        for x in range(-int(shift) - (row % 2) * width // 2 - width, SIZE, width):
            shade = rng.uniform(-spread, spread)
            fill = tuple(int(np.clip(c + shade, 0, 255)) for c in brick)
            draw.rectangle((x, y, x + width - 2, y + height - 2), fill=fill)
    return np.asarray(picture).astype(np.float32)


def _brick(rng):
    return (
        _bricks(rng, 16, 8, (166, 74, 56), (214, 196, 184), 18) + 5 * _noise(rng, 20, 20)[..., None]
    )


def _sea(rng):
    waves = 26 * _noise(rng, 20, 5) + 8 * _noise(rng, 5, 4)
    return _vertical((34, 122, 200), (8, 76, 150)) + waves[..., None] * [0.7, 1.0, 0.9]


def _jungle(rng):
    leaves = 26 * _noise(rng, 14, 14) + 14 * _noise(rng, 5, 5)
    image = _vertical((30, 92, 46), (16, 54, 28)) + leaves[..., None] * [0.6, 1.0, 0.5]
    for x in rng.permutation(8)[:3] * 8 + rng.integers(0, 4):
        image[:, x : x + 4] = np.array([74, 50, 30]) + 10 * _noise(rng, 16, 4)[:, x : x + 4, None]
    return image


def _desert(rng):
    image = _vertical((250, 206, 120), (255, 236, 190))
    for row, color in ((24, (232, 150, 70)), (40, (206, 112, 44))):
        t = np.arange(SIZE) / SIZE
        dune = row + rng.uniform(-3, 3) + 5 * np.sin(2 * np.pi * (t + rng.uniform()))
        ground = np.array(color, np.float32) + 6 * _noise(rng, 12, 5)[..., None]
        image = _below(image, ground, dune.astype(np.float32))
    return image


def _fabric(rng):
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    folds = np.sin(2 * np.pi * (3 * x + rng.uniform(0.5, 1.5) * y + 0.3 * _noise(rng, 3, 3)))
    return np.array([242, 152, 190]) + (20 * folds + 4 * _noise(rng, 30, 30))[..., None]


def _wood(rng):
    planks = _bricks(rng, 64, 11, (176, 118, 66), (96, 58, 28), 14)
    return planks + 12 * _noise(rng, 48, 5)[..., None] * [1.0, 0.8, 0.6]


def _city(rng):
    picture = Image.fromarray(_vertical((176, 206, 232), (224, 228, 232)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    x = -int(rng.integers(0, 8))
    while x < SIZE:
        width, top = int(rng.integers(10, 18)), int(rng.integers(4, 22))
        shade = int(rng.integers(90, 150))
        draw.rectangle((x, top, x + width - 1, 50), fill=(shade, shade + 2, shade + 12))
        for wy in range(top + 3, 46, 6):
            for wx in range(x + 2, x + width - 3, 4):
                draw.rectangle((wx, wy, wx + 1, wy + 2), fill=(244, 226, 150))
        x += width
    draw.rectangle((0, 48, SIZE, SIZE), fill=(84, 84, 90))
    draw.rectangle((0, 47, SIZE, 48), fill=(190, 190, 190))
    return np.asarray(picture).astype(np.float32)


def _cobblestone(rng):
    return (
        _bricks(rng, 10, 8, (148, 146, 142), (84, 82, 80), 22) + 8 * _noise(rng, 24, 24)[..., None]
    )


def _white(rng):
    return np.full((SIZE, SIZE, 3), rng.uniform(244, 253)) + 2 * _noise(rng, 3, 3)[..., None]


def _mountain(rng):
    t = np.linspace(0, 1, SIZE, dtype=np.float32)
    image = _vertical((120, 176, 236), (206, 226, 244))
    peaks = 34 - 22 * np.abs(np.sin(np.pi * (1.7 * t + rng.uniform()))) + 2 * _noise(rng, 3, 12)[0]
    rock = _vertical((250, 250, 255), (84, 92, 116)) + 10 * _noise(rng, 10, 14)[..., None]
    image = _below(image, rock, peaks)
    meadow = _vertical((110, 150, 80), (70, 118, 52)) + 8 * _noise(rng, 10, 16)[..., None]
    return _below(image, meadow, 46 + 2 * _noise(rng, 3, 4)[0])


def _autumn(rng):
    leaves = _noise(rng, 20, 20)[..., None]
    hue = _noise(rng, 12, 12)[..., None]
    return np.array([190, 92, 26]) + 34 * leaves + 46 * hue * np.array([0.6, 1.0, 0.2])


def _wheat(rng):
    stalks = 26 * _noise(rng, 6, 34) + 10 * _noise(rng, 20, 20)
    wheat = _vertical((236, 200, 92), (186, 142, 44)) + stalks[..., None] * [1.0, 0.9, 0.4]
    horizon = 20 + rng.uniform(-3, 3) + 1.5 * _noise(rng, 3, 16)[0]
    return _below(_vertical((120, 190, 244), (190, 224, 248)), wheat, horizon)


def _rug(rng):
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    period = int(rng.integers(10, 15))
    lozenge = np.abs((x + y) % period - period / 2) + np.abs((x - y) % period - period / 2)
    weave = np.where(lozenge < period / 2, 1.0, -0.4)[..., None]
    return np.array([112, 48, 150]) + 34 * weave + 8 * _noise(rng, 30, 30)[..., None]


SCENES = {
    "snow": _snow,
    "beach": _beach,
    "grass": _grass,
    "night": _night,
    "brick": _brick,
    "sea": _sea,
    "jungle": _jungle,
    "desert": _desert,
    "fabric": _fabric,
    "wood": _wood,
    "city": _city,
    "cobblestone": _cobblestone,
    "white": _white,
    "mountain": _mountain,
    "autumn": _autumn,
    "wheat": _wheat,
    "rug": _rug,
}
