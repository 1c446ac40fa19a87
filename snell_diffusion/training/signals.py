"""SIGINT and SIGTERM end a run between two steps, after its state is saved."""

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
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._noted = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self._noted = time.monotonic()
            self.request(signum)
        elif signum == signal.SIGINT and time.monotonic() - self._noted > _ONE_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(signum)

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
