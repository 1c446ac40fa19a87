"""The first signal is noted, the second one acts as usual."""

import os
import signal
import threading

import pytest

from snell_diffusion.training.errors import Interrupted
from snell_diffusion.training.signals import StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_noted_once_and_handlers_come_back(signum: int) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        assert signal.getsignal(signum) == before[signum]
    assert {s: signal.getsignal(s) for s in before} == before


def test_another_thread_can_ask_but_gets_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            stop.request()
            seen.append((stop.signum, signal.getsignal(signal.SIGINT) == before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.SIGINT, True)]


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes(signum: int, code: int) -> None:
    assert Interrupted(signum, "stopped").exit_code == code
