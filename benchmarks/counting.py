"""Bytes and operations of one step, counted: the same on every machine and in every run.

    saved          what the graph keeps between forward and backward pass, parameters not counted
    peak           the most that lives during the step, parameters not counted, inputs counted
    backward_peak  the most that lives during the backward pass beyond what lived as it began
    flops          floating-point operations of all products, two per multiply-add

Bytes are those of tensor storages, each counted once however many views it has. Not counted: what
a kernel takes for itself while it runs, and arrays that never were tensors.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from snell_diffusion.core.scratch import release_scratch
from snell_diffusion.diffusion.memory.live import LiveBytes, backward


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one step; see the module."""

    saved: int
    peak: int
    backward_peak: int
    flops: int

    def values(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


class DenseAndSparse(LiveBytes):
    """Live bytes also of sparse tensors, which have two storages: indices and values."""

    def add(self, tensors: Iterable[Tensor]) -> None:
        super().add(part for tensor in tensors for part in _stored(tensor))


class SavedBytes:
    """Bytes of the storages that graphs built inside `counting` keep, those of `known` left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {_key(part) for tensor in known for part in _stored(tensor)}
        self._found: dict[int, tuple[weakref.ref[Any], int]] = {}

    @property
    def total(self) -> int:
        """Bytes now: a graph that was dropped keeps nothing."""
        return sum(size for storage, size in self._found.values() if storage() is not None)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Watch what graphs built inside save."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        for part in _stored(tensor):
            if _key(part) not in self._known:
                storage = part.untyped_storage()
                self._found[_key(part)] = weakref.ref(storage), storage.nbytes()
        return tensor


def _stored(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors with storages that a tensor consists of."""
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _pairs(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Distances of all pairs of points [..., I, q] and [..., O, q]: as a product of the two."""
    return 2 * math.prod(a) * b[-2]


def _pair_gradients(grad: Any, a: Sequence[int], b: Sequence[int], *args: Any, **kw: Any) -> int:
    """The gradient of `_pairs` towards one of its inputs."""
    return _pairs(a, b)


class Operations(TorchDispatchMode):
    """Counts what torch's `FlopCounterMode` counts, and the distances that it does not know.

    That one follows modules by hooks that hold on to tensors: with checkpointing it alone would
    raise the peak several times over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        aten = torch.ops.aten
        own = {aten._euclidean_dist: _pairs, aten._cdist_forward: _pairs}
        own |= {aten._cdist_backward: _pair_gradients}
        self._formulas = {**flop_registry, **{op: shape_wrapper(f) for op, f in own.items()}}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def count(
    forward: Callable[[], Tensor],
    fixed: Iterable[Tensor],
    inputs: Iterable[Tensor] = (),
    *,
    gradient: Tensor | None = None,
    counting: AbstractContextManager[LiveBytes] | None = None,
) -> Cost:
    """Run one step, forward and backward, and count it.

    Args:
        forward: Builds the result; gradients of earlier steps must be gone.
        fixed: What is there in any case and not counted: parameters and buffers.
        inputs: What else is there before the step, and counts.
        gradient: Of the result, one of the inputs; without it the result has one element.
        counting: Context that counts live bytes; default: those of real tensors.
    """
    fixed = list(fixed)
    release_scratch()  # else earlier steps would lend this one their memory
    with counting or DenseAndSparse() as live, Operations() as operations:
        live.add(fixed)
        before = live.live
        live.add(inputs)
        live.reset()
        saved = SavedBytes(fixed)
        with saved.counting():
            result = forward()
        peak, kept, held = live.peak, live.live, saved.total
        live.reset()
        if gradient is None:
            backward(result)
        else:
            torch.autograd.backward(result, gradient)
        return Cost(
            saved=held,
            peak=max(peak, live.peak) - before,
            backward_peak=live.peak - kept,
            flops=operations.total,
        )


def forget_gradients(model: nn.Module) -> None:
    """Free the gradients of a step."""
    for parameter in model.parameters():
        parameter.grad = None


def allocated_peaks(
    steps: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, int]:
    """The most bytes that CUDA's allocator gave out during each step, beyond those before it.

    Empty on the CPU, whose allocators keep no such record.
    """
    return {name: _allocated(step) for name, step in steps.items() if device.type == "cuda"}


def _allocated(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
