"""The frozen base in shards (FSDP2), the adapters whole on every process.

Each transformer block and each other part that a model names as indivisible is one group: its
weights are gathered when it runs, forward or backward, and dropped again. Adapters stay out
(`ignored_params`), so their gradients are averaged as in DDP, and no threshold, score or checkpoint
ever sees a shard. We call torch's `fully_shard` ourselves: accelerate shards on GPUs only, and
would shard the adapters with the base.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.adapter_tensors import adapter_parameters
from snell_diffusion.training.parallel.base import Parallel

_REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "use --gradient_checkpointing",
    "FSDP_OFFLOAD_PARAMS": "use more processes: shards stay on their device",
}


class ShardedBase(Parallel):
    """Every frozen weight of the adapted models in as many shards as there are processes.

    Reads accelerate's FSDP_VERSION (2 or unset) and FSDP_RESHARD_AFTER_FORWARD; what its other
    variables say about wrapping does not apply here.

    Raises:
        SnellaConfigError: The launcher asks for FSDP version 1, for offloading, or for activation
            checkpointing, which is this trainer's own setting.
    """

    name = "FSDP"
    shares_forward = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        # transformers would load weights on the first process alone; we shard a loaded model.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if os.environ.get("FSDP_VERSION", "2") != "2":
            raise SnellaConfigError(
                f"FSDP version {os.environ['FSDP_VERSION']} was asked for; this trainer shards "
                f"with version 2: set fsdp_version: 2 in the accelerate config"
            )
        for variable, instead in _REFUSED.items():
            if parse_flag_from_env(variable):
                name = variable.lower()
                raise SnellaConfigError(
                    f"the accelerate config sets {name}; turn it off there and {instead}"
                )
        self._classes: dict[nn.Module, type[nn.Module]] = {}

    def divide(self, components: Mapping[str, nn.Module]) -> None:
        whole = set(adapter_parameters(components))
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for model in components.values():
            self._classes[model] = type(model)
            self._shard(model, mesh, whole)

    def _shard(self, model: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
        reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True)
        # Inner blocks first: a block takes what is not yet in a group, and so does the model.
        for part in [*reversed(indivisible(model)), model]:
            fully_shard(
                part,
                mesh=mesh,
                reshard_after_forward=None if part is model else reshard,
                ignored_params=whole,
            )

    @contextmanager
    def as_loaded(self, components: Mapping[str, nn.Module]) -> Iterator[None]:
        sharded = {model: type(model) for model in components.values()}
        for model in sharded:
            model.__class__ = self._classes[model]
        try:
            yield
        finally:
            for model, kind in sharded.items():
                model.__class__ = kind


def indivisible(model: nn.Module) -> list[nn.Module]:
    """The parts that a diffusers or transformers model names as blocks, outer before inner."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [part for part in model.modules() if type(part).__name__ in names and part is not model]
