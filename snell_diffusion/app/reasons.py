"""Why a run failed, in a sentence that says what to do next and names no place on the server."""

import errno
import re
from pathlib import Path

_MEMORY = "Choose a smaller resolution or batch, or a quicker preset, and start the run again."
_CAUSES = (
    (
        r"CUDA (error: )?out of memory|CUDA_ERROR_OUT_OF_MEMORY|torch\.(cuda\.)?OutOfMemoryError"
        r"|MPS backend out of memory",
        f"The graphics card ran out of memory. {_MEMORY}",
    ),
    (
        r"No space left on device|Disk quota exceeded|File too large|os error 28",
        "The disk is full. Delete runs and adapters that you no longer need, then resume this one.",
    ),
    (
        r"\bMemoryError\b|[Cc]an(no|')t allocate memory|not enough memory|std::bad_alloc"
        r"|Unable to allocate|failed to map segment|can't start new thread",
        f"The computer ran out of memory. {_MEMORY}",
    ),
)
_KILLED = r"died with <Signals\.SIGKILL"  # the launcher's words for a trainer that was killed
_KILLED_SENTENCE = (
    "The system ended the run, most likely because memory ran out. Close other programs and "
    "resume it; if that happens again, choose a smaller resolution or batch."
)
_ERROR = re.compile(r"(?:[\w.]*(?:Error|Exception|Interrupt|Interrupted)): \S.*")
_LAUNCHER = "CalledProcessError"  # what `accelerate launch` adds, whatever went wrong
_PLACE = re.compile(r"(?<![\w/.:])(?:~|\.{1,2})?/(?:[^\s'\",;:()/]+/)+")
_TAIL = 20_000  # characters of a log that are looked through
_LONGEST = 400  # characters of a quoted reason
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason(message: str, printed: str, code: int | None) -> str:
    """What to tell about a run that ended without being finished or asked to.

    Args:
        message: What the trainer left in status.json; empty if it could not.
        printed: What the run printed.
        code: Exit code of its launcher, or minus the signal that ended it; None if unknown.
    """
    printed = printed[-_TAIL:]
    if not message and (code == -9 or re.search(_KILLED, printed)):
        return _KILLED_SENTENCE
    for pattern, sentence in _CAUSES:
        if re.search(pattern, message or printed):
            return sentence
    said = message or last_error(printed)
    if said:
        return without_places(said)[:_LONGEST]
    return "It ended without saying why. Resume it, or start it again."


def last_error(printed: str) -> str:
    """The last line that looks like an error of the run itself; empty if there is none."""
    lines = (line.strip() for line in re.split(r"[\r\n]+", printed))
    errors = [line for line in lines if _ERROR.fullmatch(line) and _LAUNCHER not in line]
    return errors[-1] if errors else ""


def without_places(text: str) -> str:
    """A message without the folders of the server: of a path its last name is left."""
    return _PLACE.sub("", text)


def refused(error: BaseException) -> str:
    """Why the files of a run could not be written, and what to do."""
    cause = error if isinstance(error, OSError) else error.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    if number in _FULL:
        return "the disk is full: delete runs and adapters that you no longer need, then try again"
    why = (cause.strerror if isinstance(cause, OSError) else None) or type(error).__name__
    return f"the server could not write the files of the run ({why}); tell the person who runs it"


def printed_since(log: Path, start: int) -> str:
    """The end of what a process wrote to `log` after byte `start`; empty without a log."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(min(start, size), size - 4 * _TAIL))
        return file.read().decode("utf-8", errors="replace")
