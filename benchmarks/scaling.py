"""How cost grows: with the weights of a Linear, and with the tokens that it multiplies.

    python -m benchmarks.scaling weights      128² to 3072² weights, 256 tokens
    python -m benchmarks.scaling tokens       16 to 4096 tokens, 768² weights

An adapted Linear computes the three products of a trained one: output, input gradient, weight
gradient. What it takes beyond a trained Linear in the same round is the kernel part, which should
grow with the weights alone.
"""

import sys
from functools import partial

from benchmarks.layers import linear_steps
from benchmarks.results import Entry
from benchmarks.section import Measure, Run, main
from benchmarks.shapes import Linear

COMPARED = ("full", "ours", "plain")
WEIGHTS = [Linear(n, n, 256) for n in (128, 256, 512, 768, 1024, 1536, 2048, 3072)]
TOKENS = [Linear(768, 768, n) for n in (16, 64, 256, 1024, 2048, 4096)]


def sweep(linears: list[Linear], run: Run) -> Entry:
    """Every size: seconds and costs of the methods."""
    if run.quick:
        linears = [Linear(*(min(n, 64) for n in linear)) for linear in linears[:2]]
    points = []
    for index, linear in enumerate(linears):
        label = f"{run.label} {linear.name} ({index + 1} of {len(linears)})"
        points.append(_point(linear, Run(run.device, run.rounds, run.quick, label)))
    return {"points": points}


def _point(linear: Linear, run: Run) -> Entry:
    steps = linear_steps(linear, COMPARED, run.device)
    return {
        "linear": list(linear),
        "seconds": run.time(steps, times=1 if run.quick else 2),
        "cost": {m: step.cost().values() for m, step in steps.items()},
    }


ENTRIES: dict[str, Measure] = {
    "weights": partial(sweep, WEIGHTS),
    "tokens": partial(sweep, TOKENS),
}

if __name__ == "__main__":
    sys.exit(main("scaling", ENTRIES))
