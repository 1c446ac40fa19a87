"""The first signal is noted; only an impatient Ctrl-C acts at once."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from snell_diffusion.training import signals
from snell_diffusion.training.errors import Interrupted
from snell_diffusion.training.signals import StopRequest


@pytest.fixture(autouse=True)
def handlers_of_a_terminal() -> Iterator[None]:
    """Python's own handlers: a process started in the background inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_noted_and_handlers_come_back(signum: int) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
    assert {s: signal.getsignal(s) for s in before} == before


def test_more_sigterms_change_nothing() -> None:
    with StopRequest() as stop:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert stop.signum == signal.SIGINT


def test_a_second_ctrl_c_acts_at_once_unless_it_is_the_first_one_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now = 101.0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        now = 103.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


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
