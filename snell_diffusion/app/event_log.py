"""Events of runs, read while they are written: only what was added since the last look."""

import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]
_HELD = 16  # logs that stay in memory; one of 2,000 steps takes about 3 MB


@dataclass
class _Read:
    file: tuple[int, int]  # device and inode: a resumed run replaces its log by a shorter one
    offset: int = 0
    events: list[Event] = field(default_factory=list)


class EventLogs:
    """A cache of log.jsonl files by path; safe to be used by several threads."""

    def __init__(self) -> None:
        self._read: OrderedDict[Path, _Read] = OrderedDict()
        self._lock = threading.Lock()

    def events(self, path: Path) -> list[Event]:
        """All whole lines so far, oldest first; none while there is no file.

        A last line without its end and lines that are no JSON table are left out.
        """
        with self._lock:
            try:
                with path.open("rb") as file:
                    return list(self._continued(path, file).events)
            except FileNotFoundError:
                self._read.pop(path, None)
                return []

    def _continued(self, path: Path, file: Any) -> _Read:
        status = os.fstat(file.fileno())
        known = self._read.get(path)
        if (
            known is None
            or known.file != (status.st_dev, status.st_ino)
            or known.offset > status.st_size
        ):
            known = self._read[path] = _Read((status.st_dev, status.st_ino))
        self._read.move_to_end(path)
        while len(self._read) > _HELD:
            self._read.popitem(last=False)
        file.seek(known.offset)
        new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        known.offset += len(whole)
        known.events += _parsed(whole)
        return known


def _parsed(lines: bytes) -> list[Event]:
    found = []
    for line in lines.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
    return found
