"""Pictures of the results, for docs/performance.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results import Entry
from benchmarks.timing import ratio, spread
from snell_diffusion.training.files import write_with

_COLOURS = {
    "base": "0.75",
    "full": "0.45",
    "lora": "tab:blue",
    "dora": "tab:cyan",
    "shira": "tab:olive",
    "plain": "tab:orange",
    "ours": "tab:green",
    "fused": "tab:red",
}
_DPI = 110


def layers(entries: Mapping[str, Entry], path: Path) -> None:
    """Step time of every timed linear as a multiple of LoRA's, by method."""
    timed = {name: entry for name, entry in entries.items() if "seconds" in entry}
    names = sorted(timed, key=lambda name: _size(timed[name]))
    methods = [m for m in ("full", "lora", "plain", "ours", "fused") if _all_have(timed, m)]
    figure = Figure(figsize=(8, 0.24 * len(names) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for method in methods:
        found = [ratio(timed[name]["seconds"], method, "lora") for name in names]
        medians = [one.median for one in found]
        below = [one.median - one.low for one in found]
        above = [one.high - one.median for one in found]
        axes.errorbar(
            medians,
            range(len(names)),
            xerr=[below, above],
            fmt="o",
            markersize=4,
            color=_COLOURS[method],
            label=method,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(-1, len(names))
    axes.set_xlabel("time of forward and backward pass, multiples of LoRA r=16")
    axes.grid(axis="x", which="both", color="0.92")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=6)
    _save(figure, path)


def models(entries: Mapping[str, Entry], path: Path) -> None:
    """Step time of every model as a multiple of LoRA's, by method."""
    names = [name for name, entry in entries.items() if "lora" in entry["seconds"]]
    methods = [m for m in _COLOURS if any(m in entries[name]["seconds"] for name in names)]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(methods)
    for place, method in enumerate(methods):
        here = [i for i, name in enumerate(names) if method in entries[name]["seconds"]]
        found = [ratio(entries[names[i]]["seconds"], method, "lora") for i in here]
        axes.bar(
            [i + (place - (len(methods) - 1) / 2) * width for i in here],
            [one.median for one in found],
            width,
            color=_COLOURS[method],
            label=method,
        )
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("step time, multiples of LoRA")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=8)
    _save(figure, path)


def memory(entries: Mapping[str, Entry], path: Path) -> None:
    """Peak live bytes of a step beyond parameters as multiples of LoRA's, by model and method."""
    names, methods = list(entries), ("full", "lora", "lora_fp32", "plain", "ours")
    colours = {**_COLOURS, "lora_fp32": "lightsteelblue"}
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(methods)
    for place, method in enumerate(methods):
        here = [i for i, name in enumerate(names) if method in entries[name]["cost"]]
        cost = [entries[names[i]]["cost"] for i in here]
        axes.bar(
            [i + (place - 2) * width for i in here],
            [found[method]["peak"] / found["lora"]["peak"] for found in cost],
            width,
            color=colours[method],
            label=method,
        )
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_ylim(0, 2)
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=20)
    axes.set_ylabel("peak live bytes, multiples of LoRA\n(cut at 2)")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=5)
    _save(figure, path)


def scaling(entries: Mapping[str, Entry], path: Path) -> None:
    """The kernel part of a step against the weights, and against the tokens."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (name, label) in zip(
        figure.subplots(1, 2),
        (("weights", "weights of the Linear, 256 tokens"), ("tokens", "tokens, 768 x 768 weights")),
        strict=True,
    ):
        points = entries[name]["points"]
        x = [point["linear"][2] for point in points]
        if name == "weights":
            x = [point["linear"][0] * point["linear"][1] for point in points]
        for method in ("plain", "ours"):
            axes.plot(x, kernel_parts(points, method), "o-", color=_COLOURS[method], label=method)
        products = [1e3 * spread(point["seconds"]["full"]).median for point in points]
        axes.plot(x, products, "o--", color=_COLOURS["full"], label="the three products")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(which="both", color="0.92")
        axes.set_ylabel("kernel part, ms")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, fontsize=8, ncols=3)
    _save(figure, path)


def kernel_parts(points: Sequence[Entry], method: str) -> list[float]:
    """Milliseconds beyond a trained Linear's in the same round, the median of every point."""
    found = []
    for point in points:
        seconds = point["seconds"]
        beyond = [a - b for a, b in zip(seconds[method], seconds["full"], strict=True)]
        found.append(1e3 * spread(beyond).median)
    return found


def _size(entry: Entry) -> tuple[int, int]:
    inputs, outputs, tokens = entry["linear"]
    return inputs * outputs, tokens


def _all_have(entries: Mapping[str, Entry], method: str) -> bool:
    return all(method in entry["seconds"] for entry in entries.values())


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    write_with(path, lambda file: figure.savefig(file, format="png", dpi=_DPI), durable=False)
