"""What `accelerate launch` was told, read from its own command line and config file.

Its environment does not say it: the launcher of a single process, which `--cpu --num_processes 2`
falls back to, passes on neither the number nor the strategy. So we look at the process that started
us and read its arguments with accelerate's own parser. A launcher on another machine, or one that
may not be looked at, is unknown, and the environment has the last word.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

_SCRIPTS = {
    "accelerate-launch": 0,
    "accelerate.commands.launch": 0,
    "accelerate": 1,
    "accelerate.commands.accelerate_cli": 1,
}
"""Names that a launcher goes by on a command line, and how many words follow before its options."""


_STRATEGIES = {
    "use_deepspeed": "DeepSpeed",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "Megatron-LM",
    "tpu": "TPU",
    "multi_gpu": "",
}
_KINDS = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM", "XLA": "TPU"}


@dataclass(frozen=True)
class Launch:
    """A request to accelerate.

    Attributes:
        processes: Over all machines; None where it is left to the launcher.
        strategy: What the processes shall do beyond DDP, for example FSDP; empty for nothing.
        cpu: Whether the processes shall compute on the CPU.
    """

    processes: int | None
    strategy: str
    cpu: bool


def find_launch() -> Launch | None:
    """What the nearest `accelerate launch` above this process was told; None without one."""
    for process in psutil.Process().parents():
        try:
            arguments = launch_arguments(process.cmdline())
            if arguments is not None:
                return read_launch(arguments, Path(process.cwd()))
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return None


def launcher_pid() -> int | None:
    """The parent process, if it is an `accelerate launch`; None if it is not or cannot be seen."""
    parent = os.getppid()
    try:
        found = launch_arguments(psutil.Process(parent).cmdline())
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    return None if found is None else parent


def launch_arguments(words: Sequence[str]) -> list[str] | None:
    """The part of a command line after `accelerate launch`; None if it is something else."""
    for place, word in enumerate(words[:4]):
        skipped = _SCRIPTS.get(Path(word).name)
        if skipped is None:
            if place and not word.startswith("-"):
                return None
            continue
        if skipped and words[place + 1 : place + 2] != ["launch"]:
            return None
        return list(words[place + 1 + skipped :])
    return None


def read_launch(arguments: Sequence[str], folder: Path) -> Launch:
    """Parse the arguments of `accelerate launch`, started in `folder`, with its config file."""
    given, _ = launch_command_parser().parse_known_args(list(arguments))
    defaults = _defaults(given, folder)
    named = [name for name in _STRATEGIES if getattr(given, name)]
    kind = str(getattr(defaults, "distributed_type", "")).rpartition(".")[2]
    # A strategy on the command line replaces that of the file.
    strategy = _STRATEGIES[named[0]] if named else _KINDS.get(kind, "")
    processes = given.num_processes or getattr(defaults, "num_processes", None)
    cpu = given.cpu or bool(getattr(defaults, "use_cpu", False))
    return Launch(processes, strategy, cpu)


def _defaults(given: Any, folder: Path) -> Any:
    """The config file that the launcher read, if any: named, or the user's own."""
    if given.config_file is not None:
        return load_config_from_file(os.fspath(folder / given.config_file))
    if os.path.isfile(default_config_file) and not given.cpu:
        return load_config_from_file(None)
    return None
