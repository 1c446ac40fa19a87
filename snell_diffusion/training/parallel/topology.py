"""What the launcher was asked for, what really started, and a refusal where the two differ.

Launchers drop requests in silence: `accelerate launch --cpu --num_processes 2` starts one process;
two processes without a GPU and without ACCELERATE_USE_CPU each believe to be alone, and write into
one folder; accelerate drops FSDP and DeepSpeed on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import get_int_from_env, parse_flag_from_env, patch_environment

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.parallel.base import Parallel
from snell_diffusion.training.parallel.launcher import Launch, find_launch
from snell_diffusion.training.parallel.replicated import Replicated


@dataclass(frozen=True)
class Topology:
    """How many processes share a run, and how.

    Attributes:
        processes: At least 1.
        strategy: none (one process), DDP, FSDP or DeepSpeed.
        cpu: Whether the CPU was asked for; otherwise a GPU is used where there is one.
    """

    processes: int
    strategy: str
    cpu: bool = False

    def __str__(self) -> str:
        return f"{self.processes} x {self.strategy}"


# By torchrun and by the launchers of MPI, the ones that accelerate reads.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def asked() -> Topology:
    """What the user asked for: by the arguments of `accelerate launch` and by the environment."""
    launch = find_launch() or Launch(None, "", False)
    processes = launch.processes or get_int_from_env(_WORLD_SIZES, 1)
    strategy = launch.strategy
    for variable, named in _VARIABLES.items():
        if parse_flag_from_env(variable):
            strategy = named
    cpu = launch.cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    return Topology(processes, strategy or _plain(processes), cpu)


def start(make_accelerator: Callable[[bool], Accelerator]) -> Parallel:
    """Start what was asked for.

    Args:
        make_accelerator: (whether to use the CPU) -> devices and process group.

    Raises:
        SnellaConfigError: Something else would run; says what was asked for and what came.
    """
    wanted = asked()
    if wanted.strategy not in _STRATEGIES:
        raise SnellaConfigError(
            f"asked for {wanted}, which this trainer does not run; it runs DDP, FSDP and DeepSpeed"
        )
    # accelerate must not take a strategy in hand that it would drop or apply to the adapters too.
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false"):
        accelerator = make_accelerator(wanted.cpu)
    got = _started(accelerator, wanted)
    if (got.processes, got.strategy) != (wanted.processes, wanted.strategy):
        raise SnellaConfigError(f"asked for {wanted}, got {got}: {_reason(wanted)}")
    return _STRATEGIES[wanted.strategy](accelerator)


def _plain(processes: int) -> str:
    return "none" if processes == 1 else "DDP"


def _started(accelerator: Accelerator, wanted: Topology) -> Topology:
    processes = accelerator.num_processes
    group = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 0
    # Sharding is our own work; what it needs is a process group that accelerate believes in too.
    if wanted.strategy in ("FSDP", "DeepSpeed") and group == processes:
        return Topology(processes, wanted.strategy)
    return Topology(processes, _plain(processes))


def _reason(wanted: Topology) -> str:
    if get_int_from_env(_WORLD_SIZES, 1) > 1 and not wanted.cpu:
        return (
            "no GPU is visible, so every process would train alone and overwrite the others. For "
            "processes on the CPU use configs/accelerate/cpu.yaml, or set ACCELERATE_USE_CPU=true"
        )
    return (
        "the launcher started other processes than it was told to. `accelerate launch` drops "
        "--num_processes with --cpu and without a second GPU; for processes on the CPU use "
        "configs/accelerate/cpu.yaml, for one process give --num_processes 1"
    )


def _sharded(accelerator: Accelerator) -> Parallel:
    from snell_diffusion.training.parallel.fsdp import ShardedBase

    return ShardedBase(accelerator)


def _deepspeed(accelerator: Accelerator) -> Parallel:
    from snell_diffusion.training.parallel.zero import Zero

    return Zero(accelerator)


_STRATEGIES: dict[str, Callable[[Accelerator], Parallel]] = {
    "none": Replicated,
    "DDP": Replicated,
    "FSDP": _sharded,
    "DeepSpeed": _deepspeed,
}
