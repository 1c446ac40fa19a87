"""What may be in the JSON of a request: its depth, and no file that was not uploaded."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snell_diffusion.errors import SnellaValueError

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


def read_json(body: bytes, depth: int) -> Any:
    """The value of a JSON text; an empty text is None.

    Args:
        body: UTF-8, of bounded length.
        depth: How deep lists and tables may be nested.

    Raises:
        SnellaValueError: Too deep, or not JSON.
    """
    if not body.strip():
        return None
    if nesting(body) > depth:
        raise SnellaValueError(
            f"the request is nested deeper than {depth} levels; the page sends none such"
        )
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise SnellaValueError("the request is not JSON; reload the page and try again") from None


def nesting(body: bytes) -> int:
    """How deep the lists and tables of a JSON text are nested, without reading it as a tree."""
    deepest = level = 0
    for bracket in _STRING.sub(b"", body).translate(None, _NO_BRACKETS):
        level += 1 if bracket in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


def require_uploaded(value: Any, cache: Path) -> None:
    """Refuse files that are not in the cache: the server opens and fetches nothing for a visitor.

    Args:
        value: The request.
        cache: Folder of uploads and shown pictures.

    Raises:
        SnellaValueError: A "path" is an address, or leads elsewhere.
    """
    for path in paths_in(value):
        if "\0" in path or not Path(path).resolve().is_relative_to(cache):
            raise SnellaValueError(
                "a file is named that was not uploaded here: upload the file itself"
            )


def paths_in(value: Any) -> Iterator[str]:
    """Every text that stands under the key "path", at any depth."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            path = item.get("path")
            if isinstance(path, str):
                yield path
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
