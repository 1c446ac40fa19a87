"""Memory and operations of a step on models of real sizes, computed from fake tensors.

    python -m benchmarks.memory               all
    python -m benchmarks.memory flux          one

Nothing is allocated and nothing is timed: shapes run through the real code, and the figures are
those of the program. As on a GPU: the code takes the paths that it takes there, but the blocks of
our updates are as large as on a CPU.
"""

import sys
from dataclasses import replace
from functools import partial

import torch
from tqdm.auto import tqdm

from benchmarks.counting import Cost, count
from benchmarks.fakes import make_fake
from benchmarks.methods import adapt, path, trained_bytes
from benchmarks.results import Entry
from benchmarks.section import Measure, Run, main
from benchmarks.shortened import shorten
from benchmarks.works import QUICK, WORKS, Work, checkpoint_activations, loss_of
from snell_diffusion.diffusion.memory.live import FakeDevice

COMPARED = ("lora", "lora_fp32", "ours", "plain", "full")


def fake_cost(
    work: Work,
    method: str,
    batch: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
    whole: bool = False,
) -> tuple[Cost, int]:
    """Count the step of one method; and the bytes that it trains.

    Args:
        work: The model.
        method: One of the methods.
        batch: Pictures.
        dtype: Of the base.
        checkpointing: Whether activations are computed again in the backward pass.
        whole: Go through the arithmetic of every layer's update too, which takes long.
    """
    device = FakeDevice()
    with torch.device("meta"):
        model = work.model(dtype)
    adapt(model, method, work.paths(model))
    if checkpointing:
        checkpoint_activations(model)
    skipped = 0 if whole or method != "ours" else shorten(model, checkpointing)
    make_fake(model, device)
    with device.counting():
        inputs = work.inputs(batch, dtype)
    fixed = [*model.parameters(), *model.buffers()]
    given = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    counting = device.counting()
    with path(method):
        found = count(lambda: loss_of(model(**inputs)), fixed, given, counting=counting)
    return replace(found, flops=found.flops + skipped), trained_bytes(model)


def compare(name: str, batch: int, dtype: torch.dtype, checkpointing: bool, run: Run) -> Entry:
    """Every method on one model."""
    # In float32 both LoRAs are the same.
    methods = [m for m in COMPARED if m != "lora_fp32" or dtype != torch.float32]
    work, batch = WORKS[QUICK[name] if run.quick else name], 1 if run.quick else batch
    costs = {}
    for method in tqdm(methods, desc=f"  {run.label}", smoothing=0, leave=False):
        costs[method] = fake_cost(work, method, batch, dtype, checkpointing)
    return {
        "title": work.title,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "checkpointing": checkpointing,
        "cost": {m: cost.values() for m, (cost, _) in costs.items()},
        "trained_bytes": {m: size for m, (_, size) in costs.items()},
    }


def _entries() -> dict[str, Measure]:
    """The rows of the table; large denoisers with and without gradient checkpointing."""
    single, half = torch.float32, torch.bfloat16
    found: dict[str, Measure] = {
        "vit-b": partial(compare, "vit-b", 32, single, False),
        "vit-l": partial(compare, "vit-l", 32, single, False),
        "vit-h": partial(compare, "vit-h", 32, half, False),
        "sd15": partial(compare, "sd15", 4, single, False),
    }
    for name in ("sdxl", "sd35", "flux"):
        found[name] = partial(compare, name, 1, half, False)
        found[f"{name}-checkpointed"] = partial(compare, name, 1, half, True)
    return found


ENTRIES = _entries()

if __name__ == "__main__":
    sys.exit(main("memory", ENTRIES))
