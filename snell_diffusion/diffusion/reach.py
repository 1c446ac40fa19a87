"""Which projections of an attention block its processor uses, and which the model calls past it.

Lumina-Next's blocks call `to_out` themselves, outside of the processor: an update that only the
processor inserts would be lost there without a word.
"""

import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["reaches"]


def reaches(processor: Any, attn: nn.Module, place: str) -> bool:
    """Whether a processor's code names a projection, for example `to_q` or `to_out.0`.

    Functions it calls and methods of the block that it calls are read too.
    """
    return place.partition(".")[0] in _names(type(processor), type(attn))


@cache
def _names(processor: type[Any], attn: type[Any]) -> frozenset[str]:
    names: set[str] = set()
    seen: set[CodeType] = set()
    todo = [_entry(processor)]
    while todo:
        function = inspect.unwrap(todo.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        here = set(_mentioned(code))
        names |= here
        for name in here:
            methods = (inspect.getattr_static(kind, name, None) for kind in (processor, attn))
            found = (function.__globals__.get(name), *methods)
            todo += [called for called in found if _ours(called)]
    return frozenset(names)


def _entry(processor: type[Any]) -> Any:
    called = processor.__call__
    return processor.forward if called is nn.Module.__call__ else called


def _ours(called: Any) -> bool:
    return isinstance(called, FunctionType) and not called.__module__.startswith("torch")


def _mentioned(code: CodeType) -> Iterator[str]:
    """Names and texts in a function's code, nested functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _mentioned(constant)
