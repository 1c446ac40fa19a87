"""Per-adapter containers whose tensors keep their precision when the model around them is cast."""

from collections.abc import Callable

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

__all__ = ["PreciseBufferDict", "PreciseParameterDict"]

Apply = Callable[[Tensor], Tensor]
REFUSED = frozenset({torch.float16, torch.bfloat16})


def keep_precision(fn: Apply, fixed: bool = False) -> Apply:
    """Wrap the function behind `module.to(...)`: devices change, precision is never lost.

    Args:
        fn: What `nn.Module._apply` was given.
        fixed: Keep the dtype whatever `fn` does; otherwise float32 may become float64 and back.
    """

    def apply(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        lost = out.dtype != tensor.dtype if fixed else out.dtype in REFUSED
        return tensor.to(device=out.device) if lost else out

    return apply


class PreciseParameterDict(nn.ParameterDict):
    """Parameters by adapter name; `.to(bfloat16)`, `.half()` and the like never round them.

    Updates of 1e-6 next to weights of 1e-2 do not survive 16 bits, and neither do their moments.
    """

    def _apply(self, fn: Apply, recurse: bool = True) -> nn.Module:
        return super()._apply(keep_precision(fn), recurse)


class PreciseBufferDict(BufferDict):
    """Saved buffers by adapter name whose dtype never changes.

    A sparsity level decides how many entries survive: cast to another dtype it is another level.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)

    def _apply(self, fn: Apply, recurse: bool = True) -> nn.Module:
        return super()._apply(keep_precision(fn, fixed=True), recurse)
