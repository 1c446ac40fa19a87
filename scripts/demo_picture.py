"""The demo's picture: rows are prompts, columns are photo, base model and adapted model."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

CELL = 192
GAP = 8
LABEL = 150  # width of the prompt column
HEAD = 34
SMALL = 14


@dataclass(frozen=True)
class Row:
    """One prompt and its pictures, in the order of the columns."""

    prompt: str
    pictures: Sequence[Image.Image]


def comparison(columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Draw labelled rows of pictures on white.

    Small pictures are enlarged without smoothing, so that the picture shows the real pixels.

    Raises:
        ValueError: A row has not one picture per column.
    """
    for row in rows:
        if len(row.pictures) != len(columns):
            raise ValueError(
                f"row {row.prompt!r} needs {len(columns)} pictures ({', '.join(columns)}), "
                f"got {len(row.pictures)}"
            )
    width = LABEL + len(columns) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, HEAD + len(rows) * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(SMALL)
    for index, title in enumerate(columns):
        centre = LABEL + index * (CELL + GAP) + CELL // 2
        draw.text((centre, HEAD // 2), title, "black", font, anchor="mm")
    for number, row in enumerate(rows):
        top = HEAD + number * (CELL + GAP)
        text = "\n".join(wrap(row.prompt, 18))
        draw.multiline_text((GAP, top + CELL // 2), text, "black", font, anchor="lm")
        for index, picture in enumerate(row.pictures):
            scaled = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(scaled, (LABEL + index * (CELL + GAP), top))
    return sheet
