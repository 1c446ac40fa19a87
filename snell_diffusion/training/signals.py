"""SIGINT and SIGTERM end a run between two steps, after its state is saved."""

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context that notes the first SIGINT or SIGTERM; a second one acts as if it were not there.

    Signals reach only a process's main thread: in another thread this notes nothing, and `request`
    takes its place.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.request(signum)
        self._restore()

    def request(self, signum: int = signal.SIGINT) -> None:
        """Ask the run to stop after the current step."""
        self.signum = signum

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
