"""Whether the fused kernels can be used, and what happens when they cannot after all."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

MAX_HEADS, MAX_COLUMNS = 8, 64

log = logging.getLogger(__name__)
_failures: list[str] = []
_off: list[bool] = []  # not a context variable: backward passes on a GPU run in other threads


class LaunchError(RuntimeError):
    """A fused kernel could not be compiled or started; nothing was computed."""


def available(device: torch.device) -> bool:
    """Whether `ops` works on `device`: needs the package triton and CUDA, and no failure so far.

    On the CPU it is true under Triton's interpreter (TRITON_INTERPRET=1 before the first import),
    which is for tests: it is thousands of times slower. While torch.compile traces, it is false.
    """
    if _failures or _off or torch.compiler.is_compiling():
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and _loads()
    return device.type == "cuda" and _loads()


def attempt(device: torch.device, fused: Callable[[], T], plain: Callable[[], T]) -> T:
    """fused() where it is available and starts, else plain(). Errors in arguments are raised."""
    if available(device):
        try:
            return fused()
        except LaunchError:  # already logged, once
            pass
    return plain()


@contextmanager
def switched_off() -> Iterator[None]:
    """Have the formulas of torch serve inside, in every thread, to compare the two."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()


def failed(reason: str) -> LaunchError:
    """Switch the fused kernels off for this process and say so; returns the error to raise."""
    if not _failures:
        log.warning("fused GPU kernels are off, the slower formulas of torch serve: %s", reason)
    _failures.append(reason)
    return LaunchError(reason)


@functools.cache
def _loads() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module(".ops", __package__)
    except Exception as problem:  # a broken or foreign installation fails in many ways
        failed(f"triton cannot be imported: {problem}")
        return False
    return True


def serves(A: Tensor, kernel: str, p: float) -> bool:
    """Whether the fused kernels compute an update with A [H, I, q], and are `available` for it."""
    if type(A) not in (Tensor, torch.nn.Parameter):
        return False  # a fake tensor, say, which says that it is on a GPU
    fits = A.dtype == torch.float32 and A.shape[0] <= MAX_HEADS and A.shape[2] <= MAX_COLUMNS
    return fits and kernel in ("mixed", "distance") and p == 2 and available(A.device)
