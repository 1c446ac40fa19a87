"""What was promised, as ratios measured side by side, and whether the results keep it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.results import Entry, Results
from benchmarks.shapes import linears
from benchmarks.timing import ratio

CPU, GPU = "cpu", "gpu"
MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """What was found.

    Attributes:
        value: The number that the target is about.
        shown: It with its spread or its place, for people.
        operations: The same ratio by operation count, below which no implementation can go;
            None where it is no ratio of times.
    """

    value: float
    shown: str
    operations: float | None = None


Find = Callable[[Results], Figure | None]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: In words.
        limit: The figure must not be above it.
        find: Looks the figure up; None where it was not measured.
        command: Measures it.
        where: CPU or GPU: whose results it is in.
    """

    what: str
    limit: float
    find: Find
    command: str
    where: str = CPU

    def verdict(self, figure: Figure | None) -> str:
        if figure is None:
            return "not measured: needs an H200" if self.where == GPU else "not measured"
        return "met" if figure.value <= self.limit else "**not met**"


def timed(section: str, name: str, over: str, under: str) -> Find:
    """The median ratio of two methods' seconds, over all rounds."""

    def find(results: Results) -> Figure | None:
        return _timed(results.get(section, name), over, under)

    return find


def _timed(entry: Entry | None, over: str, under: str) -> Figure | None:
    seconds = (entry or {}).get("seconds", {})
    if entry is None or over not in seconds or under not in seconds:
        return None
    found, cost = ratio(seconds, over, under), entry.get("cost", {})
    both = over in cost and under in cost
    operations = cost[over]["flops"] / cost[under]["flops"] if both else None
    shown = f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
    return Figure(found.median, shown, operations)


def worst(finds: Sequence[tuple[str, Find]]) -> Find:
    """The largest of several figures, with its place; None unless all were measured."""

    def find(results: Results) -> Figure | None:
        figures = [(place, one(results)) for place, one in finds]
        known = [(place, figure) for place, figure in figures if figure is not None]
        if not known or len(known) < len(figures):
            return None
        place, most = max(known, key=lambda pair: pair[1].value)
        shown = f"{most.shown}, the worst of {len(known)}: {place}"
        return Figure(most.value, shown, most.operations)

    return find


def counted(section: str, name: str, what: str, over: str, under: str) -> Find:
    """The ratio of two methods' counted bytes or operations."""

    def find(results: Results) -> Figure | None:
        cost = (results.get(section, name) or {}).get("cost", {})
        if over not in cost or under not in cost:
            return None
        value = cost[over][what] / cost[under][what]
        return Figure(value, f"{value:.3f}")

    return find


def best_on_gpu(name: str, under: str) -> Find:
    """Our step's ratio through the path that is the default there: fused, else merged."""

    def find(results: Results) -> Figure | None:
        entry = results.get("models", name)
        return _timed(entry, "fused", under) or _timed(entry, "ours", under)

    return find


def _load_seconds(results: Results) -> Figure | None:
    entry = results.get("loading", "sdxl")
    if entry is None:
        return None
    seconds = sorted(entry["seconds"]["ours"])
    median = seconds[len(seconds) // 2]
    return Figure(median, f"{median:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})")


def _load_bytes(results: Results) -> Figure | None:
    entry = results.get("loading", "sdxl")
    if entry is None:
        return None
    memory, base = entry["memory"]["ours"], entry["base_bytes"]
    shown = (
        f"{memory['peak'] / base:.3f} ({memory['peak'] / MIB:.0f} MiB; {memory['kept'] / MIB:.0f} "
        f"MiB stay; the base has {base / MIB:.0f} MiB)"
    )
    return Figure(memory["peak"] / base, shown)


def _places(section: str, names: Iterable[str], over: str, under: str) -> list[tuple[str, Find]]:
    return [(name, timed(section, name, over, under)) for name in names]


def _memory(what: str) -> Find:
    rows = ("vit-b", "vit-l", "vit-h", "sd15", "sdxl", "sdxl-checkpointed", "flux")
    rows += ("flux-checkpointed",)
    return worst([(name, counted("memory", name, what, "ours", "lora")) for name in rows])


VIT = ("768x768@1576", "768x3072@1576")
UNETS = tuple(
    shape.name
    for shape, users in linears().items()
    if shape.tokens == 256 and {"SD 1.5", "SDXL"} & set(users)
)
_CALLS = ("embedded-unet", "embedded-dit", "vit-b", "sd15")
_STEPS = {"sd15": ("SD 1.5", 1.10), "sdxl": ("SDXL", 1.20), "flux": ("FLUX", 1.15)}
_STEPS |= {"vit-l": ("ViT-L", 1.5)}


def _backward_peaks(names: Iterable[str]) -> Find:
    what = "backward_peak"
    return worst([(name, counted("layers", name, what, "ours", "plain")) for name in names])


def _table() -> list[Target]:
    layers, models = "python -m benchmarks.layers", "python -m benchmarks.models"
    rows = [
        Target(
            f"one adapted Linear {name}, ours / plain",
            0.35,
            timed("layers", name, "ours", "plain"),
            f"{layers} {name}",
        )
        for name in VIT
    ]
    rows += [
        Target(
            "one adapted Linear of SD 1.5 and SDXL at 256 tokens, ours / plain",
            0.25,
            worst(_places("layers", UNETS, "ours", "plain")),
            f"{layers} '*@256'",
        ),
        Target(
            "training step of the embedded base, ours / LoRA at equal parameters",
            1.25,
            timed("models", "trainer", "ours", "lora"),
            f"{models} trainer",
        ),
        Target(
            "ViT-B/16 step at batch 8, ours / LoRA r=16",
            1.5,
            timed("models", "vit-b", "ours", "lora"),
            f"{models} vit-b",
        ),
        Target(
            "ViT-B/16 step at batch 8, ours / full fine-tuning",
            1.2,
            timed("models", "vit-b", "ours", "full"),
            f"{models} vit-b",
        ),
        Target(
            "SD 1.5 step of real size at batch 1, ours / LoRA r=16",
            1.15,
            timed("models", "sd15", "ours", "lora"),
            f"{models} sd15",
        ),
        Target(
            "bytes saved for backward, ours / LoRA, on ViT-B/L/H, SD 1.5, SDXL, FLUX",
            1.0,
            _memory("saved"),
            "python -m benchmarks.memory",
        ),
        Target(
            "peak live bytes of a step, ours / LoRA, on the same",
            1.02,
            _memory("peak"),
            "python -m benchmarks.memory",
        ),
        Target(
            "peak live bytes in a Linear's backward pass, ours / plain, on the shapes above",
            0.35,
            _backward_peaks((*VIT, *UNETS)),
            f"{layers} '768x*@1576' '*@256'",
        ),
    ]
    rows += [
        Target(
            f"H200: {title} step in bf16, ours / LoRA r=16",
            limit,
            best_on_gpu(name, "lora"),
            f"python -m benchmarks.gpu models {name}",
            GPU,
        )
        for name, (title, limit) in _STEPS.items()
    ]
    rows += [
        Target(
            "H200: step in bf16, ours / plain, on the same",
            0.5,
            worst([(name, best_on_gpu(name, "plain")) for name in _STEPS]),
            "python -m benchmarks.gpu models",
            GPU,
        ),
    ]
    rows += [
        Target(
            f"inference of a whole model, adapter {way}, ours / base",
            1.02,
            worst(_places("inference", _CALLS, way, "base")),
            "python -m benchmarks.inference",
        )
        for way in ("cached", "fused")
    ]
    rows += [
        Target(
            "loading an SDXL-size adapter, seconds",
            1.0,
            _load_seconds,
            "python -m benchmarks.loading",
        ),
        Target(
            "bytes beyond the base while it loads, as a share of the base (a copy would be 1)",
            0.25,
            _load_bytes,
            "python -m benchmarks.loading",
        ),
    ]
    return rows


TARGETS = _table()
