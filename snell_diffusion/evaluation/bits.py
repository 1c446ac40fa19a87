"""How many bits a number of SNELLA's factors needs: held-out loss against bytes of the file.

Every run trains on a subject's photos but one. SNELLA is trained in float32 and then rounded
(post-training), and trained with few bits from the start (quantization-aware), at several ranks;
LoRA's ranks, stored in 16 bits, are the yardstick. `gain` is the drop of the held-out loss, as a
share of what it was.

A plan is YAML: `base`, `subjects` (name, class_word), `seeds`, `common` settings of the trainer,
`snella` and `lora` (their settings), `ranks`, `lora_ranks`, `bits`.
"""

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from snell_diffusion.adapters import read_adapter
from snell_diffusion.adapters.attach import fill
from snell_diffusion.adapters.quantize import quantize_adapter, rounded
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.state import adapter_layers
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import make_config
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.objective import build_probe
from snell_diffusion.diffusion.optimization import start_processes
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.diffusion.setup import ADAPTER, build_model
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.evaluation.stamp import program, stamp
from snell_diffusion.training.adapter_tensors import evaluating
from snell_diffusion.training.config_files import read_mapping
from snell_diffusion.training.files import write_json

__all__ = ["Point", "measure_all", "plot", "smallest", "summarize", "table"]

KEYS = {
    *("base", "subjects", "seeds", "common", "snella", "lora"),
    *("ranks", "lora_ranks", "bits"),
}
KEPT_SHARE = 0.95
"""Share of float32's gain that the shipped setting must keep."""


@dataclass(frozen=True)
class Point:
    """One file: how it was made, its size and what it gains.

    Attributes:
        kind: "float", "post-training", "trained" (with that many bits) or "lora".
        rank: Columns of the factors.
        bits: Per number of the factors as stored.
        subject, seed: Of the run.
        gain: 1 - held-out loss after / before training.
        file_bytes: The whole file.
        factor_bytes: What its factors alone take.
    """

    kind: str
    rank: int
    bits: int
    subject: str
    seed: int
    gain: float
    file_bytes: int
    factor_bytes: int


def measure_all(config: Path, photos: Path, output: Path) -> None:
    """Run what has no point yet; write bits.json, bits.png and bits.md.

    Args:
        config: The plan.
        photos: One folder per subject in it.
        output: Folder for these files and the runs.

    Raises:
        SnellaConfigError: Not a plan, or settings that are none of a run.
    """
    plan = read_mapping(config)
    if set(plan) != KEYS:
        raise SnellaConfigError(f"{config}: expected the keys {', '.join(sorted(KEYS))}")
    path = output / "bits.json"
    known = json.loads(path.read_text("utf-8"))["points"] if path.exists() else []
    points = [Point(**row) for row in known]
    done = {(p.kind, p.rank, p.bits, p.subject, p.seed) for p in points}
    output.mkdir(parents=True, exist_ok=True)
    for job in tqdm(list(_jobs(plan)), desc="runs", smoothing=0):
        if job[:5] in done:
            continue
        points += _measure(plan, job, photos, output)
        write_json(path, {**stamp(program()), "plan": plan, "points": [asdict(p) for p in points]})
    plot(points, output / "bits.png")
    (output / "bits.md").write_text(table(points) + "\n", "utf-8")
    print(table(points))


Job = tuple[str, int, int, str, int, str]


def _jobs(plan: dict[str, Any]) -> Iterator[Job]:
    for seed in plan["seeds"]:
        for subject in plan["subjects"]:
            name, word = subject["name"], subject["class_word"]
            for rank in plan["lora_ranks"]:
                yield "lora", rank, 16, name, seed, word
            for rank in plan["ranks"]:
                yield "float", rank, 32, name, seed, word
                for bits in plan["bits"]:
                    yield "trained", rank, bits, name, seed, word


def _measure(plan: dict[str, Any], job: Job, photos: Path, output: Path) -> list[Point]:
    kind, rank, bits, subject, seed, word = job
    own = plan["lora"] if kind == "lora" else plan["snella"]
    more = [f"bits={bits}"] if kind == "trained" else []
    folder = output / "runs" / f"{kind}-{rank}-{bits}-{subject}-{seed}"
    config = make_config(
        {
            "pretrained_model_name_or_path": plan["base"],
            "instance_data_dir": str(photos / subject),
            "instance_prompt": f"a photo of a sks {word}",
            "num_validation_photos": 1,
            "output_dir": str(folder),
            "overwrite": True,
            "seed": seed,
            "rank": rank,
            **plan["common"],
            **own,
            "method_args": [*own.get("method_args", []), *more],
        }
    )
    result = run(config)
    path = result.adapter_path
    assert path is not None
    before, after = result.validation_loss_before, result.validation_loss_after
    assert before is not None
    assert after is not None

    def point(kind: str, bits: int, loss: float, file: Path) -> Point:
        sizes = file.stat().st_size, _factor_bytes(config, result.sizes.layers, file, bits)
        return Point(kind, rank, bits, subject, seed, 1 - loss / before, *sizes)

    if kind == "lora":
        half = folder / "half.safetensors"
        save_file({k: v.half() for k, v in load_file(path).items()}, half)
        return [point(kind, bits, after, half)]
    found = [point(kind, bits, after, path)]
    if kind == "float":
        file = read_adapter(path)
        for few in plan["bits"]:
            small = quantize_adapter(path, folder / f"{few}-bit.safetensors", few)
            loss = held_out_loss(config, rounded(file, few))
            found.append(point("post-training", few, loss, small))
    return found


def _factor_bytes(config: TrainConfig, layers: int, file: Path, bits: int) -> int:
    if config.method != "snella":
        return sum(t.numel() * t.element_size() for t in load_file(file).values())
    tensors = read_adapter(file).tensors
    numbers = [t.numel() for n, t in tensors.items() if n.endswith(("snella_A", "snella_B"))]
    return sum(-(-n * bits // 8) + (8 if bits < 32 else 0) for n in numbers)


@torch.no_grad()
def held_out_loss(config: TrainConfig, file: AdapterFile) -> float:
    """The held-out loss of a run's photos with another adapter of the same shapes.

    Args:
        config: Of the run; a float32 adapter of SNELLA.
        file: What takes the place of its adapter.
    """
    photos = Photos.find(config, RunFolder(config))
    parallel = start_processes(config)
    model = build_model(config, parallel.device)
    for component, path, layer in adapter_layers(model.components, ADAPTER):
        fill(layer, ADAPTER, file.by_layer[f"{component}.{path}"])
    probe = build_probe(config, model, photos.held_out, parallel)
    assert probe is not None
    model.phases.enter("train")
    with evaluating(model.components):
        loss = float(probe.loss())
    del model
    gc.collect()
    return loss


@dataclass(frozen=True)
class Row:
    """Points of one kind, rank and number of bits over subjects and seeds."""

    kind: str
    rank: int
    bits: int
    runs: int
    gain: float
    kept: float
    file_bytes: int
    factor_bytes: int


def summarize(points: list[Point]) -> list[Row]:
    """Means over runs, with the share of the gain of float32 at the largest rank, run by run."""
    top = max(p.rank for p in points if p.kind == "float")
    whole = {(p.subject, p.seed): p.gain for p in points if (p.kind, p.rank) == ("float", top)}
    groups: dict[tuple[str, int, int], list[Point]] = {}
    for p in points:
        if (p.subject, p.seed) in whole:
            groups.setdefault((p.kind, p.rank, p.bits), []).append(p)
    rows = []
    for (kind, rank, bits), some in groups.items():
        gain = sum(p.gain for p in some) / len(some)
        reference = sum(whole[p.subject, p.seed] for p in some) / len(some)
        rows.append(
            Row(
                *(kind, rank, bits, len(some), gain, gain / reference),
                max(p.file_bytes for p in some),
                max(p.factor_bytes for p in some),
            )
        )
    return sorted(rows, key=lambda row: row.file_bytes)


def smallest(rows: list[Row]) -> Row | None:
    """The smallest file of SNELLA that keeps `KEPT_SHARE` of float32's gain."""
    good = [row for row in rows if row.kind != "lora" and row.kept >= KEPT_SHARE]
    return min(good, key=lambda row: row.file_bytes, default=None)


def table(points: list[Point]) -> str:
    """The rows as a Markdown table, smallest file first; the shipped one is marked."""
    rows = summarize(points)
    best = smallest(rows)
    lines = [
        "| factors | rank | bits | runs | gain in held-out loss | of float32's | file | factors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = " **(smallest with 95 %)**" if row == best else ""
        lines.append(
            f"| {row.kind}{mark} | {row.rank} | {row.bits} | {row.runs} | {row.gain:.4f} | "
            f"{row.kept:.1%} | {row.file_bytes:,} B | {row.factor_bytes:,} B |"
        )
    return "\n".join(lines)


def plot(points: list[Point], path: Path) -> None:
    """Gain against bytes of the file, a line for each kind and rank."""
    from matplotlib.figure import Figure

    rows = summarize(points)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        ranks = 0 if row.kind == "lora" else row.rank
        lines.setdefault((row.kind, ranks), []).append(row)
    for row in [row for row in rows if row.kind == "float"]:
        for kind in ("trained", "post-training"):
            lines.setdefault((kind, row.rank), []).append(row)
    for (kind, rank), some in sorted(lines.items()):
        if kind == "float":
            continue
        some.sort(key=lambda row: row.file_bytes)
        name = "LoRA, 16 bits, by rank" if kind == "lora" else f"SNELLA, rank {rank}, {kind}"
        style = {"lora": "s--", "trained": "o-", "post-training": "v:"}[kind]
        axes.plot([r.file_bytes for r in some], [r.gain for r in some], style, label=name)
        for row in some:
            text = f"r{row.rank}" if kind == "lora" else f"{row.bits}"
            axes.annotate(
                text, (row.file_bytes, row.gain), xytext=(3, 4), textcoords="offset points"
            )
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the file")
    axes.set_ylabel("gain: drop of the held-out loss, as a share of it")
    axes.set_title("Numbers beside the points: bits per number, or LoRA's rank")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
