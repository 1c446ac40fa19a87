"""Operations and live bytes that must not grow unnoticed: counted, compared with values on record.

    python -m benchmarks.regression            compare
    python -m benchmarks.regression --write    record what is counted now

Counted from tensors on the CPU, real ones for single linears and fake ones for whole models, so the
figures are the same on every machine. The test suite compares; no clock takes part.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.counting import Cost
from benchmarks.layers import LinearModel, LinearStep
from benchmarks.memory import fake_cost
from benchmarks.results import FOLDER
from benchmarks.shapes import Linear
from benchmarks.works import WORKS, vit
from snell_diffusion.training.files import write_text

RECORD = FOLDER / "regression.json"
TOLERANCE = 0.01
UPDATE = "python -m benchmarks.regression --write"

Figures = dict[str, dict[str, int]]

_LINEARS = (Linear(256, 256, 128), Linear(256, 768, 128), Linear(768, 320, 77))


def figures() -> Figures:
    """What is counted now, by work."""
    found = {f"linear {shape.name}": linear_cost(shape) for shape in _LINEARS}
    blocks = replace(WORKS["vit-b"], build=vit(768, 2, 12, 16))
    for name, work in {"2 blocks of ViT-B/16": blocks, "UNet": WORKS["embedded-unet"]}.items():
        found[f"{name}, batch 2"] = fake_cost(work, "ours", 2, torch.float32, whole=True)[0]
    return {name: cost.values() for name, cost in found.items()}


def linear_cost(shape: Linear, method: str = "ours") -> Cost:
    """One adapted Linear with real tensors."""
    torch.manual_seed(0)
    base = LinearModel(shape.inputs, shape.outputs)
    x = torch.randn(shape.tokens, shape.inputs, requires_grad=True)
    gy = torch.randn(shape.tokens, shape.outputs)
    return LinearStep(base, method, x, gy).cost()


def differences(recorded: Mapping[str, Mapping[str, int]], now: Figures) -> list[str]:
    """Every figure further than TOLERANCE from its record, and every one that has none, in words.

    Lower is a difference too: a record that is too high would let the next growth pass.
    """
    found = [f"{work}: on record, but no longer counted" for work in recorded if work not in now]
    for work, counted in now.items():
        for name, value in counted.items():
            before = recorded.get(work, {}).get(name)
            if before is None:
                found.append(f"{work}: {name} {value:,} has no record")
            elif abs(value - before) > TOLERANCE * before:
                share = f" ({value / before - 1:+.1%})" if before else ""
                found.append(f"{work}: {name} {value:,}, on record {before:,}{share}")
    return found


def message(found: Sequence[str]) -> str:
    """What a developer should read when figures differ."""
    lines = "\n  ".join(found)
    return (
        f"operations or live bytes differ by more than {TOLERANCE:.0%} from {RECORD.name}:\n"
        f"  {lines}\n"
        f"If the change is meant, record it with: {UPDATE}"
    )


def read(path: Path = RECORD) -> Figures:
    """The figures on record."""
    found: Figures = json.loads(path.read_text("utf-8"))
    return found


def main(arguments: Sequence[str], path: Path = RECORD) -> int:
    """Compare or record; exit status 1 where figures differ."""
    now = figures()
    if "--write" in arguments:
        write_text(path, json.dumps(now, indent=1, sort_keys=True) + "\n")
        print(f"recorded: {path}")
        return 0
    found = differences(read(path), now)
    print(message(found) if found else f"all figures are those of {path.name}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
