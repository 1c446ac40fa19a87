"""Where the time of one of our steps goes, by operator: what a missed target is explained from.

    python -m benchmarks.profile

Self time of every operator of torch over some steps, as shares of all of it. Profiling slows small
operators, so shares are no timings.
"""

import sys
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.layers import LinearModel, LinearStep
from benchmarks.methods import path
from benchmarks.results import Entry
from benchmarks.section import Measure, Run, main
from benchmarks.shapes import Linear

_STEPS, _SHOWN = 5, 12
_LINEARS = (Linear(768, 768, 1576), Linear(320, 320, 256), Linear(768, 320, 77))


def operators(shape: Linear, run: Run) -> Entry:
    """The operators that take most of a Linear's step."""
    inputs, outputs, tokens = (min(n, 64) for n in shape) if run.quick else shape
    torch.manual_seed(0)
    with run.device:
        base = LinearModel(inputs, outputs)
        x = torch.randn(tokens, inputs, requires_grad=True)
        gy = torch.randn(tokens, outputs)
    step = LinearStep(base, "ours", x, gy)
    step()
    kinds = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as record, path("ours"):
        for _ in range(_STEPS):
            step()
    time = "self_device_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    found = sorted(record.key_averages(), key=lambda event: -getattr(event, time))
    whole = sum(getattr(event, time) for event in found)
    return {
        "linear": [inputs, outputs, tokens],
        "calls": sum(event.count for event in found) // _STEPS,
        "operators": [
            {
                "name": event.key,
                "share": getattr(event, time) / whole,
                "calls": event.count // _STEPS,
            }
            for event in found[:_SHOWN]
        ],
    }


ENTRIES: dict[str, Measure] = {shape.name: partial(operators, shape) for shape in _LINEARS}

if __name__ == "__main__":
    sys.exit(main("profile", ENTRIES))
