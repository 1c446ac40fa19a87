"""Float64 numbers in files that hold float32 at most: three parts that add up to the number.

    x = high + middle + low        exactly: 3 x 24 bits hold the 53 bits of a double
    high = fl32(x),  middle = fl32(x - high),  low = fl32(x - high - middle)

Sparsity levels need it: rounded to float32, a level of a large layer keeps another number of
entries.
"""

import torch
from torch import Tensor

from snell_diffusion.errors import SnellaValueError, quoted

__all__ = ["join_doubles", "split_doubles"]

PARTS = 3


def split_doubles(numbers: Tensor, place: str, hint: str = "choose another value") -> Tensor:
    """float64 [...] to float32 [..., 3], high part first.

    Args:
        place: What the numbers are, for messages.
        hint: What an error tells to do next.

    Raises:
        SnellaValueError: A number with no such parts: not finite, above 3.4e38, or, unless it is
            0, so small that its last bits are below the smallest float32.
    """
    parts, rest = [], numbers.detach().to(torch.float64)
    for _ in range(PARTS):
        part = rest.to(torch.float32)
        rest = rest - part.to(torch.float64)
        parts.append(part)
    if not bool((rest == 0).all()):
        raise SnellaValueError(
            f"{place}: expected 0 or numbers of magnitude 1e-28 to 3e38, got "
            f"{quoted(numbers.tolist())}; files hold no others: {hint}"
        )
    return torch.stack(parts, dim=-1)


def join_doubles(parts: Tensor, place: str) -> Tensor:
    """The inverse of `split_doubles`: [..., 3] to float64 [...], exactly.

    Raises:
        SnellaValueError: Not float32 [..., 3], or three numbers that `split_doubles` never gives.
    """
    if parts.dtype != torch.float32 or parts.dim() < 1 or parts.shape[-1] != PARTS:
        raise SnellaValueError(
            f"{place}: expected F32 with a last axis of {PARTS} (a number in {PARTS} parts), got "
            f"{parts.dtype} of shape {list(parts.shape)}; save the adapter again"
        )
    high, middle, low = parts.to(torch.float64).unbind(-1)
    numbers = high + (middle + low)
    if not torch.equal(split_doubles(numbers, place), parts):
        raise SnellaValueError(
            f"{place}: expected the {PARTS} parts of one number, high part first, got "
            f"{quoted(parts.tolist())}; the file was not written by snell_diffusion: save it again"
        )
    return numbers
