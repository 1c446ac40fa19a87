"""The allocation of a run as a picture: which layers keep how much of their update, over time.

Drawn on every look at a running page, so with numpy and Pillow: a figure of matplotlib takes a
hundred times as long.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from snell_diffusion.app.event_log import Event
from snell_diffusion.training.plots import place_of

WIDTH = 600  # pixels; with letters of 18 it can be read on a narrow screen too
LETTER = 18
HEAT, BARS = 190, 150  # heights of the two parts in pixels
LEFT, RIGHT, GAP = 66, 94, 8
HELD = 32  # pictures that stay in memory, half a megabyte each
# Dark blue over green to yellow: grows in lightness, so it is read without colours as well.
_RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
_INK, _GRID = (40, 40, 40), (200, 200, 200)


@dataclass(frozen=True)
class Allocation:
    """Kept share of every layer over a run.

    Attributes:
        names: Layers in the order of the network, L of them.
        blocks: Block that each belongs to, L short labels; layers of a block are neighbours.
        steps: Optimizer steps of the T records, ascending.
        share_TL: Kept share, 0 to 1, (T, L).
        sizes: Entries of each layer's update, L.
    """

    names: list[str]
    blocks: list[str]
    steps: list[int]
    share_TL: np.ndarray
    sizes: np.ndarray


def allocation(events: Sequence[Event]) -> Allocation | None:
    """What the layers keep, from a run's log; None before the first record and without levels."""
    records = [e for e in events if e["event"] == "allocation" and e.get("layers")]
    if not records:
        return None
    names = [row["name"] for row in sorted(records[0]["layers"], key=lambda r: place_of(r["name"]))]
    by_step = [{r["name"]: r["budget"] / max(1, r["size"]) for r in e["layers"]} for e in records]
    sizes = {row["name"]: row["size"] for row in records[0]["layers"]}
    return Allocation(
        names,
        [block(name) for name in names],
        [e["step"] for e in records],
        np.array([[shares.get(name, 0.0) for name in names] for shares in by_step]),
        np.array([sizes[name] for name in names]),
    )


_WORDS = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid"}


def block(name: str) -> str:
    """Short label of a layer's block: 'down 1', 'mid', 'text 0'; by its place in the network.

    The number is the first one on the layer's path.
    """
    component, *path = name.split(".")
    number = next((part for part in path if part.isdigit()), "")
    if component.startswith("text"):
        return f"text {number}".strip()
    stage = _WORDS.get(path[0], "block") if path else "block"
    return stage if stage == "mid" else f"{stage} {number}".strip()


def draw(found: Allocation) -> Image.Image:
    """Kept share of all layers over the steps, and below it the share of each block now.

    Returns:
        RGB, WIDTH pixels wide.
    """
    font = ImageFont.load_default(LETTER)
    line = LETTER + 6
    top = 2 * line
    canvas = Image.new("RGB", (WIDTH, top + HEAT + 2 * line + BARS + 2 * line), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((LEFT, GAP), "Share of its update that each layer keeps", _INK, font)
    _heat(canvas, pen, font, found, top)
    _scale(canvas, pen, font, top)
    below = top + HEAT + 2 * line
    pen.text((LEFT, below - line - 2), f"By block, at step {found.steps[-1]}", _INK, font)
    _bars(pen, font, found, below)
    return canvas


def _heat(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    a: Allocation,
    y: int,
) -> None:
    """Layers from left to right, steps from top to bottom."""
    across = WIDTH - LEFT - RIGHT
    picture = Image.fromarray(colours(a.share_TL))
    canvas.paste(picture.resize((across, HEAT), Image.Resampling.NEAREST), (LEFT, y))
    count = len(a.steps)
    for row in np.unique(np.linspace(0, count - 1, min(6, count)).round().astype(int)):
        middle = y + (row + 0.5) * HEAT / count
        pen.text((LEFT - GAP, middle), str(a.steps[row]), _INK, font, anchor="rm")
    pen.text((LEFT - GAP, y - LETTER), "step", _INK, font, anchor="rm")


def _scale(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, y: int
) -> None:
    """What the colours mean: 0 % at the bottom, 100 % at the top."""
    levels = np.linspace(1, 0, HEAT)[:, None]
    x = WIDTH - RIGHT + 2 * GAP
    canvas.paste(Image.fromarray(colours(levels)).resize((14, HEAT)), (x, y))
    for level, anchor in ((1.0, "lt"), (0.5, "lm"), (0.0, "lb")):
        place = (x + 18, y + (1 - level) * (HEAT - 1))
        pen.text(place, f"{level:.0%}", _INK, font, anchor=anchor)


def _bars(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, a: Allocation, y: int) -> None:
    """Kept share of each block in the newest record, and of all of them as a line."""
    labels, shares = by_block(a)
    across = WIDTH - LEFT - RIGHT
    for level in (0.0, 0.5, 1.0):
        height = y + BARS * (1 - level)
        pen.line((LEFT, height, LEFT + across, height), _GRID)
        pen.text((LEFT - GAP, height), f"{level:.0%}", _INK, font, anchor="rm")
    slot = across / len(labels)
    fills = colours(np.array(shares)[:, None])[:, 0]
    for i, (level, fill) in enumerate(zip(shares, fills, strict=True)):
        x = LEFT + i * slot
        box = (
            x + 0.1 * slot,
            y + BARS * (1 - level),
            x + max(0.9 * slot, 0.1 * slot + 1),
            y + BARS,
        )
        pen.rectangle(box, fill=tuple(int(part) for part in fill), outline=_INK)
    _block_labels(pen, font, labels, slot, y + BARS + GAP)
    whole = float((a.share_TL[-1] * a.sizes).sum() / a.sizes.sum())
    height = y + BARS * (1 - whole)
    pen.line((LEFT, height, LEFT + across, height), (200, 30, 30), 2)
    pen.text((LEFT + across + GAP, height), f"all {whole:.0%}", (170, 0, 0), font, anchor="lm")


def _block_labels(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    labels: Sequence[str],
    slot: float,
    y: int,
) -> None:
    """As many labels as fit beside each other; where there are too many, every second or so."""
    widest = max(font.getlength(label) for label in labels) + GAP
    every = max(1, int(np.ceil(widest / slot)))
    for i in range(0, len(labels), every):
        pen.text((LEFT + (i + 0.5) * slot, y), labels[i], _INK, font, anchor="mt")


def by_block(a: Allocation) -> tuple[list[str], list[float]]:
    """Labels of the blocks in order, and what share of its entries each keeps now."""
    labels = list(dict.fromkeys(a.blocks))
    shares = []
    for label in labels:
        inside = np.array([other == label for other in a.blocks])
        kept = (a.share_TL[-1, inside] * a.sizes[inside]).sum()
        shares.append(float(kept / a.sizes[inside].sum()))
    return labels, shares


def colours(share: np.ndarray) -> np.ndarray:
    """The colour of each share, 0 to 1: (H, W) -> (H, W, 3) bytes."""
    place = np.clip(share, 0, 1) * (len(_RAMP) - 1)
    lower = np.minimum(place.astype(int), len(_RAMP) - 2)
    part = (place - lower)[..., None]
    return ((1 - part) * _RAMP[lower] + part * _RAMP[lower + 1]).round().astype(np.uint8)


class AllocationPictures:
    """Pictures by run and number of records: a look at an unchanged run draws nothing."""

    def __init__(self) -> None:
        self._drawn: OrderedDict[tuple[str, int, int], Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, job: str, events: Sequence[Event]) -> Image.Image | None:
        """The picture of a run; None before its first record."""
        with self._lock:
            key = (job, *allocation_version(events))
            if key not in self._drawn:
                found = allocation(events)
                if found is None:
                    return None
                self._drawn[key] = draw(found)
                while len(self._drawn) > HELD:
                    self._drawn.popitem(last=False)
            return self._drawn[key]


def allocation_version(events: Sequence[Event]) -> tuple[int, int]:
    """(number of records, step of the newest): what a picture depends on."""
    steps = [event.get("step", 0) for event in events if event["event"] == "allocation"]
    return len(steps), steps[-1] if steps else -1
