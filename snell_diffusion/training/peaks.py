"""The most memory that each phase of a run takes."""

from pathlib import Path

import psutil
import torch

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMeter:
    """Measures one peak per phase: call it with the name of the phase that begins now.

    On CUDA these are bytes of tensors, elsewhere resident bytes of the process: what earlier
    phases freed but the allocator kept counts, as it does for the system. Where the system does
    not start a new peak (other than Linux, some containers), the resident memory at the end of a
    phase stands in.

    Attributes:
        peaks: Bytes by phase; a phase that comes back keeps its largest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phase: str | None = None
        self._restarted = False
        self.peaks: dict[str, int] = {}

    def __call__(self, phase: str) -> None:
        if phase != self._phase:
            self.close()
            self._reset()
            self._phase = phase

    def close(self) -> None:
        """End the phase that is on."""
        if self._phase is not None:
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self._peak())
            self._phase = None

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._restarted = _restart()

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._restarted:
            line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return int(psutil.Process().memory_info().rss)


def _restart() -> bool:
    """Ask the system to start a new peak of resident memory; whether it does."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True
