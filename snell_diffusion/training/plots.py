"""Pictures of a run: loss curve, where the budget went, labelled sheets of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from snell_diffusion.training.files import write_with

Event = dict[str, Any]
_DPI = 110
_LABEL = 12
_MARGIN = 6
_USUAL_LABEL = "step 000000"
_LARGEST_CELL = 256


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    write_with(path, lambda file: figure.savefig(file, dpi=_DPI), durable=False)


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Trailing mean over `window` values; shorter at the start."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (total[ends] - total[starts]) / (ends - starts)


def loss_curve(events: Sequence[Event], path: Path) -> None:
    """Training loss, its trailing mean, and the held-out loss over the steps of one run.

    Args:
        events: Events of the run's log; `step` and `validation` are used. At least one `step`.
        path: PNG to write.
    """
    steps = [e for e in events if e["event"] == "step"]
    held_out = [e for e in events if e["event"] == "validation" and "validation_loss" in e]
    x, y = [e["step"] for e in steps], [e["loss"] for e in steps]
    window = max(1, len(y) // 20)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y, color="0.8", linewidth=0.8, label="training loss, each step")
    axes.plot(x, _smooth(y, window), color="tab:blue", label=f"mean of the last {window} steps")
    if held_out:
        hx, hy = [e["step"] for e in held_out], [e["validation_loss"] for e in held_out]
        axes.plot(hx, hy, "o-", color="tab:orange", label="held-out photos, fixed timesteps")
        axes.axhline(
            held_out[0]["validation_loss_base"],
            color="tab:orange",
            linestyle=":",
            label="held-out photos, base model",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (mean squared error)")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=2)
    _save(figure, path)


def allocation_picture(events: Sequence[Event], path: Path) -> None:
    """The share of its update that each layer may keep, through the network and over the steps.

    Args:
        events: Events of the run's log; `allocation` is used, at least one.
        path: PNG to write.
    """
    records = [e for e in events if e["event"] == "allocation"]
    last = sorted(records[-1]["layers"], key=lambda row: place_of(row["name"]))
    names = [row["name"] for row in last]
    share = np.array([_shares(e["layers"], names) for e in records])
    figure = Figure(figsize=(max(7, 0.14 * len(names) + 2), 6), layout="constrained")
    over_time, at_end = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    picture = over_time.imshow(
        share, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
    )
    ticks = np.unique(np.linspace(0, len(records) - 1, min(6, len(records))).round().astype(int))
    over_time.set_yticks(ticks, [str(records[i]["step"]) for i in ticks])
    over_time.set_ylabel("optimizer step")
    figure.colorbar(picture, ax=over_time, label="kept share")
    stages = [_stage(name) for name in names]
    for stage in dict.fromkeys(stages):
        places = [i for i, other in enumerate(stages) if other == stage]
        at_end.bar(places, share[-1, places], label=stage)
    whole = sum(row["budget"] for row in last) / sum(row["size"] for row in last)
    at_end.axhline(whole, color="0.4", linestyle=":", label=f"all layers {whole:.0%}")
    at_end.set_ylim(0, 1.02)
    at_end.set_ylabel(f"kept share at step {records[-1]['step']}")
    at_end.set_xticks(range(len(names)), [_short(n) for n in names], rotation=90, fontsize=5)
    figure.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=6)
    _save(figure, path)


def _shares(layers: Sequence[Event], names: Sequence[str]) -> list[float]:
    by_name = {row["name"]: row["budget"] / row["size"] for row in layers}
    return [by_name[name] for name in names]


# A UNet lists its up blocks before its middle block; data take them in this order.
_STAGES = ("down_blocks", "mid_block", "up_blocks")


def _stage(name: str) -> str:
    component, block = name.split(".")[:2]
    return f"{component} {block}" if block in _STAGES else component


def place_of(name: str) -> tuple[int, int]:
    """Order through the network: text encoders, then the stages of a UNet; else as listed."""
    component, block = name.split(".")[:2]
    return int(not component.startswith("text")), _STAGES.index(block) if block in _STAGES else 0


def _short(name: str) -> str:
    words = {"attentions": "a", "transformer_blocks": "t", "down_blocks": "d", "up_blocks": "u"}
    return ".".join(words.get(part, part) for part in name.split("."))


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    side: int,
) -> Image.Image:
    """Lay pictures out in a labelled grid.

    Args:
        rows: Pictures; every row has the same number, all pictures the same size.
        row_labels: Text left of each row; may be empty strings.
        column_labels: Text above each column, wrapped to its width.
        side: Side of a cell in pixels.
    """
    font = ImageFont.load_default(_LABEL)
    headings = [wrapped(text, side, font) for text in column_labels]
    top = _header(headings)
    left = _left(row_labels)
    width = left + len(column_labels) * (side + _MARGIN)
    canvas = Image.new("RGB", (width, top + len(rows) * (side + _MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(headings):
        place = (left + column * (side + _MARGIN), _MARGIN)
        draw.multiline_text(place, "\n".join(lines), fill="black", font=font, spacing=3)
    for r, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        y = top + r * (side + _MARGIN)
        draw.text((_MARGIN, y + side // 2 - _LABEL // 2), label, fill="black", font=font)
        for c, picture in enumerate(pictures):
            cell = picture.resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(cell, (left + c * (side + _MARGIN), y))
    return canvas


def _left(row_labels: Sequence[str]) -> int:
    """Width of the row labels; that of a step's at least, so that sheets fit below each other."""
    font = ImageFont.load_default(_LABEL)
    labels = (_USUAL_LABEL, *row_labels)
    return max(int(font.getlength(text)) for text in labels) + 2 * _MARGIN


def _header(headings: Sequence[Sequence[str]]) -> int:
    return max(len(lines) for lines in headings) * (_LABEL + 3) + 2 * _MARGIN


def stack_sheets(paths: Sequence[Path], column_labels: Sequence[str], side: int) -> Image.Image:
    """Put saved sheets of the same columns below each other, the column labels once.

    Cells larger than 256 pixels are shown at 256: the sheets keep them, and a picture of a whole
    run must stay one that can be opened.

    Args:
        paths: PNG files of `sheet`, at least one, whose row labels are no longer than a step's.
        column_labels: Their column labels.
        side: Side of their cells in pixels.
    """
    shown, left, font = min(side, _LARGEST_CELL), _left(()), ImageFont.load_default(_LABEL)
    top = _header([wrapped(text, side, font) for text in column_labels])
    strips = []
    for path in paths:
        with Image.open(path) as image:
            for y in range(top, image.height, side + _MARGIN):
                strips.append(image.convert("RGB").crop((0, y, image.width, y + side)))
    blank = sheet([], [], column_labels, shown)
    height = blank.height + len(strips) * (shown + _MARGIN)
    canvas = Image.new("RGB", (blank.width, height), "white")
    canvas.paste(blank, (0, 0))
    for row, strip in enumerate(strips):
        y, middle = blank.height + row * (shown + _MARGIN), side // 2
        label = strip.crop((0, middle - _LABEL, left, middle + _LABEL))
        canvas.paste(label, (0, y + shown // 2 - _LABEL))
        for column in range(len(column_labels)):
            x = left + column * (side + _MARGIN)
            cell = strip.crop((x, 0, x + side, side))
            cell = cell.resize((shown, shown), Image.Resampling.BICUBIC)
            canvas.paste(cell, (left + column * (shown + _MARGIN), y))
    return canvas


def wrapped(text: str, width: int, font: Any) -> list[str]:
    """The text in lines of at most `width` pixels in a font, as far as its words allow."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(candidate) > width:
            lines.append(word)
        else:
            lines[-1] = candidate
    return lines
