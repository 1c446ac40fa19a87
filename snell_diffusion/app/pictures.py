"""Pictures as the page shows them and as files: enlarged, in labelled grids, as PNG."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from snell_diffusion.training.plots import sheet, wrapped

SHOWN = 384  # pixels; small pictures are shown about this large
SETTINGS_KEY = "snella_settings"  # of the text chunk in a PNG
ROW_LABEL = 40  # characters of a label left of a row
CELL = 256  # side of a picture in a grid, in pixels; smaller ones are enlarged to about this
LARGEST_CELL = 512  # larger pictures are shown at this
_CAPTION, _MARGIN = 12, 6  # pixels


def enlarged(picture: Image.Image, side: int = SHOWN) -> Image.Image:
    """A small picture with whole, unsmoothed pixels, up to about `side` of them a side."""
    factor = max(1, side // max(picture.size))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def png_bytes(picture: Image.Image, settings: Mapping[str, Any] | None = None) -> bytes:
    """A PNG of the pixels and nothing else; with settings, they are in it as JSON text."""
    plain = Image.new(picture.mode, picture.size)  # leaves behind whatever the picture carried
    plain.paste(picture)
    notes = None
    if settings is not None:
        notes = PngInfo()
        # ASCII, so that every program that shows such notes shows them right.
        notes.add_text(SETTINGS_KEY, json.dumps(settings))
    file = io.BytesIO()
    plain.save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    caption: str = "",
) -> Image.Image:
    """Pictures in rows and columns with their labels, on white.

    Args:
        rows: At least one picture; every row has the same number.
        row_labels: One for each row; long ones are cut.
        column_labels: One for each column, wrapped.
        caption: A line above all, wrapped; may be empty.
    """
    largest = max(max(picture.size) for row in rows for picture in row)
    side = min(LARGEST_CELL, largest * max(1, CELL // largest))
    squares = [[_square(picture, side) for picture in row] for row in rows]
    grid = sheet(squares, [_cut(text) for text in row_labels], column_labels, side)
    return _captioned(grid, caption) if caption else grid


def _cut(text: str) -> str:
    return text if len(text) <= ROW_LABEL else f"{text[: ROW_LABEL - 3]}..."


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The picture, whole, in the middle of a white square."""
    grown = enlarged(picture, side)
    grown.thumbnail((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(grown, ((side - grown.width) // 2, (side - grown.height) // 2))
    return canvas


def _captioned(grid: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(_CAPTION)
    lines = wrapped(caption, grid.width - 2 * _MARGIN, font)
    height = len(lines) * (_CAPTION + 4) + _MARGIN
    canvas = Image.new("RGB", (grid.width, grid.height + height), "white")
    ImageDraw.Draw(canvas).multiline_text(
        (_MARGIN, _MARGIN), "\n".join(lines), fill="black", font=font, spacing=4
    )
    canvas.paste(grid, (0, height))
    return canvas
