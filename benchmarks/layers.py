"""One adapted Linear, forward and backward, by every method: time, bytes, operations.

    python -m benchmarks.layers                      all shapes of the real models
    python -m benchmarks.layers 768x768@1576         one

The input requires a gradient, as inside a model. Linears whose product takes more than
MOST_MULTIPLY_ADDS are counted from fake tensors and not timed on a CPU; a GPU times all.
"""

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.counting import Cost, allocated_peaks, count, forget_gradients
from benchmarks.fakes import make_fake
from benchmarks.methods import adapt, path, trained_bytes, twin, unavailable
from benchmarks.results import Entry
from benchmarks.section import Measure, Run, main
from benchmarks.shapes import Linear, linears
from snell_diffusion.diffusion.memory.live import FakeDevice

MOST_MULTIPLY_ADDS = 1 << 32
COMPARED = ("base", "full", "lora", "dora", "shira", "plain", "plain_kept", "ours", "fused")
TARGETS = ("linear",)


class LinearModel(nn.Module):
    """A Linear that PEFT can find by name."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> [T, O]."""
        y: Tensor = self.linear(x)
        return y


class LinearStep:
    """Forward and backward pass of one adapted Linear on fixed random numbers.

    Args:
        base: Holds the frozen weight.
        method: One of METHODS.
        x: Input [T, I] that requires a gradient.
        gy: Gradient of the output [T, O].
    """

    def __init__(self, base: LinearModel, method: str, x: Tensor, gy: Tensor) -> None:
        self.model = adapt(twin(base), method, TARGETS)
        self.x, self.gy, self.method = x, gy, method
        self.trains = method != "base"

    def __call__(self) -> None:
        """The timed step."""
        with path(self.method), torch.set_grad_enabled(self.trains):
            y = self.model(self.x)
            if self.trains:
                torch.autograd.backward(y, self.gy)
                self.forget()

    def forget(self) -> None:
        """Free the gradients of the step."""
        self.x.grad = None
        forget_gradients(self.model)

    def cost(self) -> Cost:
        """Count the step."""
        fixed = [*self.model.parameters(), *self.model.buffers()]
        inputs = (self.x, self.gy)
        with path(self.method):
            found = count(partial(self.model, self.x), fixed, inputs, gradient=self.gy)
        self.forget()
        return found


def fake_cost(linear: Linear, method: str, dtype: torch.dtype = torch.float32) -> Cost:
    """Count the step from shapes alone."""
    device = FakeDevice(cuda=False)
    with torch.device("meta"):
        base = LinearModel(linear.inputs, linear.outputs, dtype)
    model = adapt(base, method, TARGETS)
    make_fake(model, device)
    with device.counting():
        x = torch.empty(linear.tokens, linear.inputs, dtype=dtype, requires_grad=True)
        gy = torch.empty(linear.tokens, linear.outputs, dtype=dtype)
    fixed = [*model.parameters(), *model.buffers()]
    forward, counting = partial(model, x), device.counting()
    with path(method):
        return count(forward, fixed, (x, gy), gradient=gy, counting=counting)


def compare(linear: Linear, used_by: list[str], run: Run) -> Entry:
    """Every method on one Linear."""
    if run.quick:
        linear = Linear(*(min(n, 64) for n in linear))
    timed = run.device.type == "cuda" or linear.multiply_adds <= MOST_MULTIPLY_ADDS
    methods = [m for m in COMPARED if unavailable(m, run.device) is None]
    found = _measured(linear, methods, run) if timed else _counted(linear, methods)
    return {"used_by": used_by, "linear": list(linear), **found}


def linear_steps(
    linear: Linear, methods: Sequence[str], device: torch.device
) -> dict[str, LinearStep]:
    """Every method on the same random Linear, input and gradient; bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        base = LinearModel(linear.inputs, linear.outputs, dtype)
        x = torch.randn(linear.tokens, linear.inputs, dtype=dtype, requires_grad=True)
        gy = torch.randn(linear.tokens, linear.outputs, dtype=dtype)
    return {m: LinearStep(base, m, x, gy) for m in methods}


def _measured(linear: Linear, methods: list[str], run: Run) -> Entry:
    steps = linear_steps(linear, methods, run.device)
    trained = {m: step for m, step in steps.items() if step.trains}
    return {
        "seconds": run.time(steps),
        "cost": {m: step.cost().values() for m, step in trained.items()},
        "trained_bytes": {m: trained_bytes(step.model) for m, step in trained.items()},
        "allocated": allocated_peaks(trained, run.device),
    }


def _counted(linear: Linear, methods: list[str]) -> Entry:
    # SHiRA's random choice needs values.
    chosen = [m for m in methods if m not in ("base", "shira")]
    return {"cost": {m: fake_cost(linear, m).values() for m in chosen}}


ENTRIES: dict[str, Measure] = {
    linear.name: partial(compare, linear, users) for linear, users in linears().items()
}

if __name__ == "__main__":
    sys.exit(main("layers", ENTRIES))
