"""Write docs/performance.md and its pictures from the results; nothing is measured.

    python -m benchmarks.page

The prose of the page stays, what stands between its marks is made anew.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.results import FOLDER, ROOT, Entry, Results
from benchmarks.targets import CPU, TARGETS
from benchmarks.timing import ratio, spread
from snell_diffusion.training.files import write_text

PAGE = ROOT / "docs" / "performance.md"
PICTURES = "images"
GIB, MIB = 2**30, 2**20
METHODS = ("base", "full", "lora", "lora_fp32", "dora", "shira", "plain", "plain_kept", "ours")
METHODS += ("fused",)
_NONE = "_Not measured yet._"

Lines = Iterator[str]


def gpu_results(folder: Path = FOLDER) -> list[Results]:
    """The results of GPUs."""
    files = [path for path in folder.glob("*.json") if path.stem not in ("cpu", "regression")]
    return [Results(path) for path in sorted(files)]


def page(text: str, cpu: Results, gpus: Sequence[Results]) -> str:
    """The page with the blocks between its marks made from the results.

    Raises:
        ValueError: A mark is missing.
    """
    for mark, make in BLOCKS.items():
        begin, end = f"<!-- {mark} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no block from '{begin.strip()}' to '{end}'")
        text = "".join([before, begin, *(f"{line}\n" for line in make(cpu, gpus)), end, after])
    return text


# Blocks


def targets(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """The table of what was promised."""
    yield "| what | target | found, median (quartiles) | by operations | | command |"
    yield "|---|---|---|---|---|---|"
    h200 = next((results for results in gpus if "h200" in results.path.stem), None)
    for target in TARGETS:
        where = cpu if target.where == CPU else h200
        figure = target.find(where) if where else None
        cells = [target.what, f"<= {target.limit:.2f}", figure.shown if figure else ""]
        floor = figure.operations if figure else None
        cells += [f"{floor:.2f}" if floor else "", target.verdict(figure), f"`{target.command}`"]
        yield _row(cells)


def layers(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """Single linears: ratios of time and bytes."""
    found = cpu.sections.get("layers", {})
    if not found:
        yield _NONE
        return
    yield from _picture("layers", "Step time of single linears as multiples of LoRA's")
    yield from _stamps(found)
    yield ""
    yield (
        "| inputs x outputs @ tokens | in | LoRA r=16, ms | ours / LoRA | ours / plain | "
        "plain / LoRA | ours / full | saved, ours / LoRA | backward peak, ours / plain | "
        "operations, ours / LoRA |"
    )
    yield "|---" * 10 + "|"
    for name, entry in sorted(found.items(), key=lambda item: item[1]["linear"]):
        cells = [name, ", ".join(entry["used_by"])]
        seconds, cost = entry.get("seconds"), entry["cost"]
        pairs = (("ours", "lora"), ("ours", "plain"), ("plain", "lora"), ("ours", "full"))
        lora = f"{1e3 * spread(seconds['lora']).median:.1f}" if seconds else ""
        cells += [lora, *(_times(seconds, *pair) for pair in pairs)]
        cells.append(_bytes(cost, "saved", "ours", "lora"))
        cells.append(_bytes(cost, "backward_peak", "ours", "plain"))
        cells.append(_bytes(cost, "flops", "ours", "lora"))
        yield _row(cells)


def models(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """Whole steps, on the CPU."""
    if cpu.sections.get("models"):
        yield from _picture("models", "Step time of whole models as multiples of LoRA's")
    yield from _model_table(cpu)


def _model_table(results: Results) -> Lines:
    found = results.sections.get("models", {})
    if not found:
        yield _NONE
        return
    yield from _stamps(found)
    for name, entry in found.items():
        what = [f"{key} {entry[key]}" for key in ("batch", "dtype") if key in entry]
        what += ["checkpointed"] if entry.get("checkpointing") else []
        if "ranks" in entry:
            what.append(f"LoRA r={entry['ranks']['lora']}, SNELLA r={entry['ranks']['snella']}")
        yield f"\n**{name}**: {', '.join([entry['title'], *what])}\n"
        memory = "allocated, MiB" if entry.get("allocated") else "peak live, MiB"
        yield f"| method | step, s | / LoRA | {memory} | saved, MiB | trained, MiB | TFLOP |"
        yield "|---" * 7 + "|"
        for method in (m for m in METHODS if m in entry["seconds"]):
            yield _row(_model_cells(method, entry))


def _model_cells(method: str, entry: Entry) -> list[str]:
    seconds, cost = entry["seconds"], entry["cost"].get(method)
    cells = [method, f"{spread(seconds[method]).median:.3f}", _times(seconds, method, "lora")]
    if cost is None:
        return [*cells, "", "", "", ""]
    peak = entry.get("allocated", {}).get(method, cost["peak"])
    sizes = (peak, cost["saved"], entry["trained_bytes"][method])
    return [*cells, *(f"{size / MIB:.1f}" for size in sizes), f"{cost['flops'] / 1e12:.3f}"]


def memory(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """Real sizes from fake tensors: bytes, and operations as ratios."""
    found = cpu.sections.get("memory", {})
    if not found:
        yield _NONE
        return
    yield from _picture("memory", "Peak live bytes of a step as multiples of LoRA's")
    methods = ("lora", "lora_fp32", "ours", "plain", "full")
    yield from _stamps(found)
    yield ""
    yield "Peak live bytes of a step beyond parameters, GiB (in brackets: saved for backward):"
    yield ""
    yield _row(["model", *methods, "ours / lora, peak", "ours / lora, saved"])
    yield "|---" * (len(methods) + 3) + "|"
    for name, entry in found.items():
        cost = entry["cost"]
        cells = [
            f"{cost[m]['peak'] / GIB:.3f} ({cost[m]['saved'] / GIB:.3f})" if m in cost else ""
            for m in methods
        ]
        ratios = (_bytes(cost, what, "ours", "lora") for what in ("peak", "saved"))
        yield _row([_memory_name(name, entry), *cells, *ratios])
    yield ""
    yield "Operations of the products of a step, multiples of LoRA's:"
    yield ""
    yield _row(["model", *methods])
    yield "|---" * (len(methods) + 1) + "|"
    for name, entry in found.items():
        cells = [_bytes(entry["cost"], "flops", m, "lora") for m in methods]
        yield _row([_memory_name(name, entry), *cells])


def _memory_name(name: str, entry: Entry) -> str:
    kind = " checkpointed" if entry["checkpointing"] else ""
    return f"{entry['title']}, batch {entry['batch']}, {entry['dtype']}{kind}"


def scaling(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """Slopes of the kernel part."""
    found = cpu.sections.get("scaling", {})
    if set(found) < {"weights", "tokens"}:
        yield _NONE
        return
    yield from _picture("scaling", "Kernel part against weights and tokens")
    yield from _stamps(found)
    yield ""
    points = found["weights"]["points"]
    sizes = [point["linear"][0] * point["linear"][1] for point in points]
    yield "| method | growth with the weights (exponent; 1 is linear) | with tokens, most / least |"
    yield "|---|---|---|"
    for method in ("ours", "plain"):
        parts = plots.kernel_parts(points, method)
        tokens = plots.kernel_parts(found["tokens"]["points"], method)
        ends = f"{max(tokens) / min(tokens):.2f}" if min(tokens) > 0 else "below the noise"
        yield _row([method, _exponent(sizes, parts), ends])
    beyond = {_operations_beyond(point) for point in found["tokens"]["points"]}
    constant = "the same" if len(beyond) == 1 else "not the same"
    yield (
        f"\nBy operation count the kernel part at {len(found['tokens']['points'])} numbers of "
        f"tokens is {constant}: {', '.join(f'{value:,}' for value in sorted(beyond))}."
    )


def _operations_beyond(point: Entry) -> int:
    return int(point["cost"]["ours"]["flops"] - point["cost"]["full"]["flops"])


def _exponent(sizes: Sequence[int], parts: Sequence[float]) -> str:
    """Slope of log time over log size from 512 x 512 weights on, where it is above the noise."""
    pairs = [
        (math.log(s), math.log(p))
        for s, p in zip(sizes, parts, strict=True)
        if s >= 512**2 and p > 0
    ]
    if len(pairs) < 2:
        return "too few sizes"
    mean_x, mean_y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    return f"{above / sum((x - mean_x) ** 2 for x, _ in pairs):.2f}"


def inference(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """Forward passes with an adapter."""
    found = cpu.sections.get("inference", {})
    if not found:
        yield _NONE
        return
    yield from _stamps(found)
    yield ""
    yield "| what | base, ms | cached / base | fused / base |"
    yield "|---|---|---|---|"
    for name, entry in found.items():
        seconds = entry["seconds"]
        base = f"{1e3 * spread(seconds['base']).median:.1f}"
        ratios = (_times(seconds, way, "base", 3) for way in ("cached", "fused"))
        yield _row([entry.get("title", name), base, *ratios])


def loading(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """Loading an adapter of SDXL's size."""
    entry = cpu.get("loading", "sdxl")
    if entry is None:
        yield _NONE
        return
    yield from _stamps({"sdxl": entry})
    yield ""
    yield "| adapter | file, MiB | load, s | most beyond the base, MiB | stays, MiB |"
    yield "|---|---|---|---|---|"
    for name in ("ours", "lora"):
        found, memory = spread(entry["seconds"][name]), entry["memory"][name]
        sizes = (entry["file_bytes"][name], memory["peak"], memory["kept"])
        file, peak, kept = (f"{size / MIB:.0f}" for size in sizes)
        took = f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
        yield _row([name, file, took, peak, kept])


def profile(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """The operators that our step of a Linear spends its time in."""
    found = cpu.sections.get("profile", {})
    if not found:
        yield _NONE
        return
    yield "| Linear | operator: share of the step's time (calls) |"
    yield "|---|---|"
    for name, entry in found.items():
        shares = (f"{op['name']} {op['share']:.0%} ({op['calls']})" for op in entry["operators"])
        yield _row([name, ", ".join(shares)])


def gpu(cpu: Results, gpus: Sequence[Results]) -> Lines:
    """What was measured on GPUs."""
    if not gpus:
        yield "_Not measured: no GPU was at hand. `make bench-gpu` measures it._"
    for results in gpus:
        yield f"### {results.path.stem}\n"
        yield from _model_table(results)


BLOCKS: dict[str, Callable[[Results, Sequence[Results]], Lines]] = {
    "targets": targets,
    "layers": layers,
    "models": models,
    "memory": memory,
    "scaling": scaling,
    "inference": inference,
    "loading": loading,
    "profile": profile,
    "gpu": gpu,
}


# Cells


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _times(seconds: Any, over: str, under: str, digits: int = 2) -> str:
    """Median and quartiles of the rounds' ratios; empty where one was not timed."""
    if not seconds or over not in seconds or under not in seconds:
        return ""
    found = ratio(seconds, over, under)
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def _bytes(cost: Any, what: str, over: str, under: str) -> str:
    if over not in cost or under not in cost or not cost[under][what]:
        return ""
    return f"{cost[over][what] / cost[under][what]:.3f}"


def _picture(name: str, shows: str) -> Lines:
    """One of `_PICTURES`."""
    yield f"![{shows}]({PICTURES}/{_file(name)})\n"


def _file(name: str) -> str:
    return f"performance_{name}.png"


def _stamps(entries: dict[str, Entry]) -> Lines:
    """Where the entries were measured: one line per machine and version."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries.values():
        mark = entry["stamp"]
        versions = f"torch {mark['torch']}, Python {mark['python']}, commit {mark['commit']}"
        cuda = f", CUDA {mark['cuda']}, driver {mark['driver']}" if "cuda" in mark else ""
        threads = "1 thread" if mark["threads"] == 1 else f"{mark['threads']} threads"
        key = f"{mark['machine']}, {threads}, {versions}{cuda}"
        groups.setdefault(key, []).append(mark)
    for key, marks in groups.items():
        dates = sorted(mark["date"] for mark in marks)
        count = "1 entry" if len(marks) == 1 else f"{len(marks)} entries"
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        yield f"Measured on {key}; {count}, {when}."


def draw(cpu: Results, folder: Path) -> list[Path]:
    """The pictures of the sections that were measured."""
    found = []
    for name, make in _PICTURES.items():
        entries = cpu.sections.get(name, {})
        if not entries or (name == "scaling" and set(entries) < {"weights", "tokens"}):
            continue
        path = folder / _file(name)
        make(entries, path)
        found.append(path)
    return found


_PICTURES: dict[str, Callable[[Any, Path], None]] = {
    "layers": plots.layers,
    "models": plots.models,
    "memory": plots.memory,
    "scaling": plots.scaling,
}


def main() -> int:
    """Write page and pictures."""
    cpu = Results(FOLDER / f"{CPU}.json")
    write_text(PAGE, page(PAGE.read_text("utf-8"), cpu, gpu_results()))
    for path in [*draw(cpu, PAGE.parent / PICTURES), PAGE]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
