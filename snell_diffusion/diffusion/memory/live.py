"""Count the bytes of tensors that exist only as shapes, while real code runs on them.

Fake tensors have a shape, a dtype and a storage of a stated size, but no values. Model code that
runs on them allocates and frees in the order of a real run, so the peak of the live storages is
what its tensors need. Not counted: the CUDA context (about 0.5 GiB), workspace inside kernels, and
the caching allocator's fragmentation.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# Masks and token ids that Python code reads keep their values up to this many entries.
_READABLE = 1 << 16


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside this context, and of those it was told of.

    Attributes:
        live: Bytes of the storages that exist now.
        peak: The most since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made outside; their views and repeats count once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, self._forget(key, size))
            self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        return forget

    def reset(self) -> None:
        """Begin a new peak at what lives now."""
        self.peak = self.live


# What CUDA's autocast computes in float32 (torch's list), as far as model code calls it.
_WIDE = {
    *(F.layer_norm, F.group_norm, F.softmax, F.mse_loss, F.rms_norm),
    *(torch.softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.sum, torch.norm),
    *(Tensor.softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.rsqrt, Tensor.sum, Tensor.norm),
    Tensor.__pow__,
}
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class CudaHabits(TorchFunctionMode):
    """Make fake CPU tensors take the paths that code takes on CUDA, where these need more memory.

    `is_cuda` is true; autocast computes the operators of CUDA's list in float32; order statistics
    sort; masks keep everything, since the prompts here are as long as prompts can be. Attention
    needs no help: the fused CPU kernel keeps what flash attention keeps.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return True
        if func is Tensor.kthvalue:
            values = args[0].sort().values
            return torch.return_types.kthvalue((values[0], values[0]))
        if func is Tensor.__bool__ and _is_mask(args[0]):
            return True
        if func is Tensor.__getitem__ and _is_mask(args[1]):
            return args[0].flatten(0, args[1].ndim - 1).clone()
        if func is torch.mm and "out_dtype" in kwargs:
            return torch.mm(*args).to(kwargs["out_dtype"])
        if func in _WIDE and torch.is_autocast_enabled("cpu"):
            args = [_wide(value) for value in args]
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _wide(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


class FakeDevice:
    """Tensors without values, and contexts in which every byte of them is counted.

    Args:
        autocast: Dtype of the autocast that phases may turn on; None is none.
        cuda: Count what code does on CUDA; otherwise what it does on the CPU.
    """

    def __init__(self, autocast: torch.dtype | None = None, cuda: bool = True) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._autocast, self._habits = autocast, CudaHabits if cuda else nullcontext

    @contextmanager
    def counting(self, tensors: Iterable[Tensor] = ()) -> Iterator[LiveBytes]:
        """Count what lives inside, beginning with `tensors`."""
        live, limit = LiveBytes(), fake_tensor.CONSTANT_NUMEL_LIMIT
        live.add(tensors)
        fake_tensor.CONSTANT_NUMEL_LIMIT = _READABLE
        try:
            with self._mode, live, self._habits():
                yield live
        finally:
            fake_tensor.CONSTANT_NUMEL_LIMIT = limit

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Make tensors that were there before, in a context that counts."""
        with _disable_current_modes(), self._mode, self._habits():
            yield

    def autocast(self) -> torch.autocast:
        """The precision of a training step."""
        return torch.autocast("cpu", self._autocast, enabled=self._autocast is not None)

    def fake(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and dtype without values."""
        return FakeTensor(self._mode, tensor.detach().to("meta"), torch.device("cpu"))

    def take(self, model: nn.Module) -> None:
        """Replace all tensors of a model on the meta device by fake ones; call it outside."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    fake = nn.Parameter(self.fake(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = fake
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = self.fake(buffer)
            # Tables that a model keeps as plain attributes, such as rotary frequencies.
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_meta:
                    setattr(module, name, self.fake(value))


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a model: what moving it to a device moves."""
    return [*model.parameters(), *model.buffers()]


def backward(loss: Tensor) -> None:
    """`loss.backward()` that leaves the modes on, so that checkpointed blocks run again alike.

    Torch takes its function modes off inside `Tensor.backward`.
    """
    from torch.autograd.graph import _engine_run_backward

    ones = (torch.ones_like(loss),)
    _engine_run_backward(
        (loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True
    )
