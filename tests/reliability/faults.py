"""Ways to die, put into a forked trainer: `os._exit` at a chosen call on a chosen file.

Only the calls that reach the operating system are replaced (mkdir, fsync, rename, replace, rmtree),
so a point means the same whatever the code above it looks like.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_diffusion.training import tracking

DIED = 137  # what a shell says of a process that was killed


@dataclass(frozen=True)
class Point:
    """Where to die.

    Attributes:
        call: mkdir, fsync, rename, replace, rmtree or line (one line of log.jsonl).
        path: Pattern that the path in question must match: that of the folder or file, of the
            target for renames; for a line its text.
        when: before the call, after it, or half = the file or folder has only its first half.
    """

    call: str
    path: str
    when: str


def die_at(point: Point, occurrence: int) -> Callable[[], None]:
    """An installer that ends the process when `point` is reached for the nth time, from 1."""

    def install() -> None:
        seen = 0

        def reached(path: str) -> bool:
            nonlocal seen
            if re.search(point.path, path) is None:
                return False
            seen += 1
            return seen == occurrence

        _INSTALL[point.call](point.when, reached)

    return install


Reached = Callable[[str], bool]


def _around(owner: Any, name: str, when: str, halve: Callable[..., None], due: Any) -> None:
    """Replace `owner.name` by a function that dies before, after or half-way through a due call."""
    original = getattr(owner, name)

    def call(*arguments: Any, **more: Any) -> Any:
        if not due(*arguments):
            return original(*arguments, **more)
        if when == "half":
            halve(*arguments)
        elif when == "after":
            original(*arguments, **more)
        os._exit(DIED)

    setattr(owner, name, call)


def _truncate(descriptor: int) -> None:
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)


def _on_fsync(when: str, reached: Reached) -> None:
    def due(descriptor: int) -> bool:
        return reached(os.readlink(f"/proc/self/fd/{descriptor}"))

    _around(os, "fsync", when, _truncate, due)


def _on_mkdir(when: str, reached: Reached) -> None:
    _around(os, "mkdir", when, _nothing, lambda path, *more: reached(str(path)))


def _on_rename(when: str, reached: Reached) -> None:
    _around(os, "rename", when, _half_of_source, lambda source, target, *more: reached(str(target)))


def _on_replace(when: str, reached: Reached) -> None:
    _around(
        os, "replace", when, _half_of_source, lambda source, target, *more: reached(str(target))
    )


def _half_of_source(source: Any, target: Any) -> None:
    os.truncate(source, os.stat(source).st_size // 2)


def _on_rmtree(when: str, reached: Reached) -> None:
    _around(shutil, "rmtree", when, _half_of_folder, lambda path, *more: reached(str(path)))


def _half_of_folder(path: Any) -> None:
    files = sorted(Path(path).iterdir())
    for file in files[: len(files) // 2]:
        file.unlink()


def _on_line(when: str, reached: Reached) -> None:
    def half(log: Any, line: str) -> None:
        log._file.write(line.encode()[: len(line) // 2])

    _around(tracking._Log, "append", when, half, lambda log, line: reached(line))


def _nothing(*arguments: Any) -> None:
    """A folder has no half."""


_INSTALL = {
    "mkdir": _on_mkdir,
    "fsync": _on_fsync,
    "rename": _on_rename,
    "replace": _on_replace,
    "rmtree": _on_rmtree,
    "line": _on_line,
}
