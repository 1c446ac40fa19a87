"""Plots of a page, as PNG bytes: quality against cost, drift against loss, curves, kept weights."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from snell_diffusion.evaluation.bootstrap import Interval
from snell_diffusion.evaluation.records import Record
from snell_diffusion.evaluation.results import Kept
from snell_diffusion.evaluation.summary import DRIFT, LOSS, Row, mean_curve
from snell_diffusion.evaluation.tuning import rate_losses
from snell_diffusion.training.plots import sheet

_DPI = 110
_MARKERS = "osD^vP*Xph<>"
_MIB = 2**20
_MAP_CELL = 160  # pixels

Style = dict[str, dict[str, Any]]


def styles(methods: Sequence[str]) -> Style:
    """Colour and marker of each method, the same in every plot of a page."""
    colors = colormaps["tab20"]
    # The dark half of the palette first: the pale ones are for long lists.
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    return {
        method: {"color": colors(order[i % 20]), "marker": _MARKERS[i % len(_MARKERS)]}
        for i, method in enumerate(methods)
    }


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, dpi=_DPI, format="png", metadata={"Software": None})
    return data.getvalue()


def point(
    axes: Axes, x: Interval | float, y: Interval, style: Mapping[str, Any], label: str
) -> None:
    """A mean with the intervals of both coordinates."""
    across = None
    if isinstance(x, Interval):
        across = np.array([[x.mean - x.low], [x.high - x.mean]]).clip(0)
        across = np.nan_to_num(across)
        x = x.mean
    up = np.array([[y.mean - y.low], [y.high - y.mean]]).clip(0)
    up = np.nan_to_num(up)
    axes.errorbar(
        *(x, y.mean),
        xerr=across,
        yerr=up,
        fmt=style["marker"],
        color=style["color"],
        elinewidth=1,
        alpha=0.9,
        label=label,
    )


def legend(figure: Figure, axes: Axes) -> None:
    """One legend at the right of all plots, in the order of the points."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)


def tradeoff(rows: Sequence[Row], trials: Sequence[Record], style: Style) -> bytes:
    """Drift against held-out loss: reported runs with intervals, and the rates that were tried."""
    names = ["reported runs"]
    names += ["trials: every learning rate tried"] if trials else []
    figure = Figure(figsize=(2 + 5 * len(names), 5), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    reported, tried = panels[0], panels[-1]
    for row in rows:
        if {LOSS.name, DRIFT.name} <= row.values.keys():
            values = row.values[DRIFT.name], row.values[LOSS.name]
            point(reported, *values, style[row.method], row.method)
    for row in rows:
        points = _trial_points(trials, row.method)
        if points:
            look = style[row.method]
            tried.plot(*zip(*points, strict=True), "-", markersize=4, linewidth=1, **look)
    for axes, title in zip(panels, names, strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("class drift")
        axes.set_ylabel("held-out loss, after / before")
        axes.set_title(f"{title} (lower left is better)", fontsize=10)
        axes.grid(alpha=0.3)
    legend(figure, reported)
    return png(figure)


def _trial_points(trials: Sequence[Record], method: str) -> list[tuple[float, float]]:
    """(mean drift, mean loss) of a method's learning rates, those that did not diverge."""
    found = []
    for rate, loss in rate_losses(trials, method).items():
        drifts = [
            trial.drift
            for trial in trials
            if (trial.method, trial.learning_rate) == (method, rate) and trial.drift
        ]
        if drifts and np.isfinite(loss):
            found.append((float(np.mean(drifts)), loss))
    return found


def costs(rows: Sequence[Row], style: Style) -> bytes:
    """Held-out loss against trained numbers, stored bytes and peak memory."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown = [row for row in rows if LOSS.name in row.values]
    for row in shown:
        peak = None if row.peak_bytes is None else row.peak_bytes / _MIB
        values = (float(row.trainable), row.stored_bytes / 1024, peak)
        for axes, x in zip(panels, values, strict=True):
            if x:
                point(axes, x, row.values[LOSS.name], style[row.method], row.method)
    labels = ("trained numbers", "stored, KiB", "peak memory of the training, MiB")
    for axes, label in zip(panels, labels, strict=True):
        if axes is not panels[-1]:  # memory differs by a few times only
            axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, after / before")
    legend(figure, panels[0])
    return png(figure)


def curves(records: Sequence[Record], methods: Sequence[str], style: Style) -> bytes:
    """Mean held-out loss over the steps of training, one line per method."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        line = mean_curve(records, method)
        if line:
            axes.plot(*zip(*line, strict=True), label=method, markersize=4, **style[method])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out loss / loss of the base")
    axes.grid(alpha=0.3)
    legend(figure, axes)
    return png(figure)


def kept_map(kept: Kept) -> bytes:
    """The share of each layer's update that is kept: methods by layers through the network."""
    layers = list(dict.fromkeys(layer for rows in kept.values() for layer, _ in rows))
    shares = np.full((len(kept), len(layers)), np.nan)
    for i, rows in enumerate(kept.values()):
        for layer, share in rows:
            shares[i, layers.index(layer)] = share
    size = (max(8, 0.15 * len(layers) + 2), 0.4 * len(kept) + 2.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(kept)), list(kept), fontsize=8)
    names = [layer.removeprefix("unet.").replace("transformer_blocks", "t") for layer in layers]
    axes.set_xticks(range(len(layers)), [_short(name) for name in names], rotation=90, fontsize=5)
    figure.colorbar(picture, ax=axes, label="kept share")
    return png(figure)


def _short(name: str) -> str:
    words = {"attentions": "a", "down_blocks": "d", "up_blocks": "u", "mid_block": "m"}
    return ".".join(words.get(part, part) for part in name.split("."))


def map_sheet(maps: Mapping[str, bytes]) -> bytes:
    """Which entries of one layer each method changes, side by side; dark = changed."""
    cells = []
    for data in maps.values():
        with Image.open(io.BytesIO(data)) as picture:
            cells.append(picture.convert("L").resize((_MAP_CELL, _MAP_CELL), Image.Resampling.BOX))
    found = io.BytesIO()
    sheet([[cell.convert("RGB") for cell in cells]], [""], list(maps), _MAP_CELL).save(found, "PNG")
    return found.getvalue()
