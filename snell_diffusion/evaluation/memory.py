"""The most memory that a piece of work needs beyond what is there before it.

On a GPU: tensors. On Linux: resident memory of the process, whose mark of the highest value is set
back before the work. Elsewhere the mark cannot be set back, so nothing is measured.
"""

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """What `peak_memory` found.

    Attributes:
        bytes: The most memory beyond what was there before; None where it cannot be told.
        kind: What was counted: "gpu tensors", "resident memory" or "not measured".
    """

    bytes: int | None = None
    kind: str = "not measured"


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the work inside the block; the result is complete after it."""
    peak = Peak()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.bytes, peak.kind = torch.cuda.max_memory_allocated() - before, "gpu tensors"
        return
    _give_back()
    resettable = _reset()
    before = _resident("VmRSS")
    yield peak
    if resettable:
        peak.bytes, peak.kind = max(0, _resident("VmHWM") - before), "resident memory"


def _give_back() -> None:
    """Hand the allocator's free pages to the system, so that they count when used again."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _reset() -> bool:
    """Set the mark of the highest resident memory back; False where that is not allowed."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the most since the mark was set back) in bytes; 0 without /proc."""
    if not _STATUS.exists():
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    return int(found[1]) * 1024 if found else 0
