"""Linears whose owner reads their weight instead of calling them: an update would be left out.

torch's `nn.MultiheadAttention` does it with `out_proj`, Hunyuan-DiT's attention pooling with all of
its projections. Nothing would fail; the adapter would train, load, and do nothing there.
"""

import inspect
import re
from collections.abc import Callable
from functools import cache

from torch import nn

__all__ = ["BYPASSED", "is_bypassed"]

BYPASSED = "reads the layer's weight instead of calling it, so an update would have no effect"


def is_bypassed(owner: nn.Module, name: str) -> bool:
    """Whether a module's `forward` uses the weight of its child `name` directly.

    A look at the source; where there is none, no.
    """
    # Asking for a weight's type, dtype or device is not using it.
    use = rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\.(?:dtype|device|shape|size))"
    return re.search(use, _source(type(owner).forward)) is not None


@cache
def _source(function: Callable[..., object]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
