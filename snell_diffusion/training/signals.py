"""SIGINT and SIGTERM end a run between two steps, after its state is saved."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_REQUEST_SECONDS = 2.0


class StopRequest:
    """Context that notes the first SIGINT or SIGTERM.

    More SIGTERMs change nothing: launchers and schedulers send several, and one that ended the run
    at once would lose the state that the first one asked to save. A second Ctrl-C acts as if this
    were not here, unless it comes within two seconds: a launcher passes on the Ctrl-C that the
    terminal already sent.

    Signals reach only a process's main thread: in another thread this notes nothing, and `request`
    takes its place.

    Args:
        launcher: Parent process whose end counts as SIGTERM, because it does not pass that on.
    """

    def __init__(self, launcher: int | None = None) -> None:
        self._signum: int | None = None
        self._launcher = launcher
        self._noted = 0.0
        self._previous: dict[int, object] = {}

    @property
    def signum(self) -> int | None:
        """The signal that asked for the end of the run; None while nothing did."""
        if self._signum is None and self._launcher is not None and os.getppid() != self._launcher:
            self.request(signal.SIGTERM)
        return self._signum

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is None:
            self._noted = time.monotonic()
            self.request(signum)
        elif signum == signal.SIGINT and time.monotonic() - self._noted > _ONE_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(signum)

    def request(self, signum: int = signal.SIGINT) -> None:
        """Ask the run to stop after the current step."""
        self._signum = signum

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
