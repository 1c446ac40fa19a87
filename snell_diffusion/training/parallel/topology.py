"""What the launcher was asked for, what really started, and a refusal where the two differ.

Launchers drop requests in silence: `accelerate launch --cpu --num_processes 2` starts one process,
and two processes without a GPU and without ACCELERATE_USE_CPU each believe to be alone.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.parallel.base import Parallel
from snell_diffusion.training.parallel.replicated import Replicated


@dataclass(frozen=True)
class Topology:
    """How many processes share a run, and how.

    Attributes:
        processes: At least 1.
        strategy: none (one process), DDP, FSDP or DeepSpeed.
    """

    processes: int
    strategy: str

    def __str__(self) -> str:
        return f"{self.processes} x {self.strategy}"


def asked() -> Topology:
    """What the launcher's environment asks for."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return Topology(processes, "DeepSpeed")
    if _is_on("ACCELERATE_USE_FSDP"):
        return Topology(processes, "FSDP")
    return Topology(processes, "none" if processes == 1 else "DDP")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def start(make_accelerator: Callable[[], Accelerator]) -> Parallel:
    """Start what the launcher was asked for.

    Raises:
        SnellaConfigError: Something else would run.
    """
    wanted = asked()
    if wanted.strategy in ("FSDP", "DeepSpeed"):
        raise SnellaConfigError(f"{wanted} was asked for, but adapters train with DDP only")
    accelerator = make_accelerator()
    processes = accelerator.num_processes
    got = Topology(processes, "none" if processes == 1 else "DDP")
    if got != wanted:
        raise SnellaConfigError(
            f"asked for {wanted}, got {got}: the processes would train apart and overwrite each "
            f"other"
        )
    return Replicated(accelerator)
