"""Where, when and how results were measured."""

import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def stamp(arguments: list[str]) -> dict[str, Any]:
    """Command, date, machine kind and versions; no name of a host, a user or a folder above here.

    Args:
        arguments: Of the command line, sub-command first.
    """
    return {
        "command": command(arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def command(arguments: list[str]) -> str:
    """The command line of the whole comparison; absolute paths are cut to their last part.

    `--shard I/N` is left out: with it the command would measure only a part of what is reported.
    """
    whole = [
        part
        for before, part in pairwise(["", *arguments])
        if "--shard" not in (before, part.partition("=")[0])
    ]
    shown = [Path(part).name if Path(part).is_absolute() else part for part in whole]
    return f"python -m snell_diffusion.evaluation {shlex.join(shown)}"


def machine() -> str:
    """The kind of processor that computes."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def program() -> list[str]:
    """The arguments that this process was started with."""
    return sys.argv[1:]
