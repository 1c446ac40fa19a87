"""One bar per layer, grouped by block: pictures of allocations and of the sizes of updates."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from snell_diffusion.app.allocation import colours

WIDTH, HEIGHT = 760, 340  # pixels
LETTER = 17
LEFT, RIGHT, TOP, BOTTOM = 74, 16, 76, 46  # the page writes a picture's label into its corner
GAP = 8
_INK, _GRID, _BAND = (40, 40, 40), (200, 200, 200), (244, 244, 248)
_UNKNOWN = (150, 150, 150)


def bars(
    blocks: Sequence[str], values: Sequence[float | None], top: float | None = None
) -> Image.Image:
    """A bar for each layer's share.

    Args:
        blocks: Block of each layer; those of one block are neighbours.
        values: Shares, 0 and more; None for one that is not known.
        top: Share at the upper edge; default the largest.

    Returns:
        RGB, WIDTH x HEIGHT pixels.
    """
    known = [value for value in values if value is not None]
    top = top if top is not None else max(known, default=0.0) or 1.0
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTER)
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    _bands(pen, font, blocks, slot)
    _scale(pen, font, top)
    for index, value in enumerate(values):
        _bar(pen, LEFT + index * slot, slot, value, top)
    return canvas


def _bar(pen: ImageDraw.ImageDraw, x: float, slot: float, value: float | None, top: float) -> None:
    floor = HEIGHT - BOTTOM
    inner = max(1.0, 0.85 * slot)
    if value is None:
        pen.line((x, floor - 2, x + inner, floor - 2), _UNKNOWN, 3)
        return
    share = min(1.0, value / top)
    fill = tuple(int(part) for part in colours(np.array([[share]]))[0, 0])
    height = share * (floor - TOP)
    pen.rectangle((x, floor - height, x + inner, floor), fill, _INK if slot > 4 else None)


def _scale(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, top: float) -> None:
    for part in (0.0, 0.5, 1.0):
        y = HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)
        pen.line((LEFT, y, WIDTH - RIGHT, y), _GRID)
        pen.text((LEFT - GAP, y), percent(part * top), _INK, font, anchor="rm")


def _bands(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, blocks: Sequence[str], slot: float
) -> None:
    """A shade behind every second block, and the names of those that have room for it."""
    starts = [i for i, name in enumerate(blocks) if i == 0 or blocks[i - 1] != name]
    free = 0.0
    for count, start in enumerate(starts):
        end = starts[count + 1] if count + 1 < len(starts) else len(blocks)
        x, right = LEFT + start * slot, LEFT + end * slot
        if count % 2:
            pen.rectangle((x, TOP, right, HEIGHT - BOTTOM), _BAND)
        half = font.getlength(blocks[start]) / 2
        middle = min(max((x + right) / 2, half), WIDTH - half)
        if middle - half >= free:
            pen.text((middle, HEIGHT - BOTTOM + GAP), blocks[start], _INK, font, anchor="mt")
            free = middle + half + GAP


def percent(share: float) -> str:
    """A share for people: whole percents, or two digits of a small one."""
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"
