"""Run the papers' formulas in full precision, whatever surrounds them.

The factors are small (1e-2 at the start) and the update is smaller (1e-6), so 16-bit arithmetic
loses it. Every formula of this package runs in float32, or in float64 when its input is float64.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)

N = TypeVar("N", bound=Tensor | float)


def full(value: N) -> N:
    """Cast a tensor to float32 unless it is float32 or float64 already; numbers pass."""
    if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64):
        return value.float()  # type: ignore[return-value]
    return value


def at_hand(t: Tensor) -> bool:
    """Whether a number can be read without waiting: on the CPU, neither fake nor being traced."""
    real = type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"
    return real and not torch.compiler.is_compiling()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast does not lower the precision on `device`."""
    if not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return nullcontext()  # some microseconds less
    return torch.autocast(device.type, enabled=False)
