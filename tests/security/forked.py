"""Runs a piece of work in a fork of this process, with limits, and measures what it cost."""

import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    """What became of the work.

    Attributes:
        value: What it returned (as JSON gives it back), None if it raised.
        error: Class of the exception it raised; "killed" if the limits ended it; "" if none.
        kinds: Names of the exception's classes, the most special first.
        text: The exception's message.
        seconds: CPU time.
        extra_bytes: How much more memory was resident at the peak than at the start.
    """

    value: Any = None
    error: str = ""
    kinds: tuple[str, ...] = ()
    text: str = ""
    seconds: float = 0.0
    extra_bytes: int = 0


def run_forked(
    work: Callable[[], Any], seconds: int = 20, address_space: int = 4096 * MIB
) -> Outcome:
    """Run `work` in a child that is killed after `seconds` and may map `address_space` bytes."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(work, send, seconds, address_space)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(child, 0)
    if not data:
        return Outcome(error="killed", text=f"wait status {status}")
    said = json.loads(data)
    return Outcome(**{**said, "kinds": tuple(said["kinds"])})


def _child(work: Callable[[], Any], send: int, seconds: int, address_space: int) -> None:
    try:
        # pytest-timeout's handler would raise here instead of ending the child.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        said = _measured(work)
        with os.fdopen(send, "wb") as stream:
            stream.write(json.dumps(said).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # nothing of the parent's, its capture files for one, may be flushed twice


def _measured(work: Callable[[], Any]) -> dict[str, Any]:
    start, before = _resident(), resource.getrusage(resource.RUSAGE_SELF)
    said: dict[str, Any] = {"value": None, "error": "", "kinds": [], "text": ""}
    try:
        said["value"] = work()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        said |= {"error": kinds[0], "kinds": kinds, "text": str(error)}
    after = resource.getrusage(resource.RUSAGE_SELF)
    said["seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said["extra_bytes"] = max(0, after.ru_maxrss * 1024 - start)
    return said


def _resident() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()
