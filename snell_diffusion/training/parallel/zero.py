"""DeepSpeed ZeRO behind the interface of all strategies: what it divides, by stage.

    stage 1  the optimizer's state and the float32 copies of the adapter that it steps
    stage 2  ... and the averaged gradients of the adapter
    stage 3  ... and the frozen base: each process holds 1/N of every large weight; a layer's is
             gathered when the layer runs, forward or backward, and dropped again

Stages 1 and 2 divide what belongs to the adapter, which is small: they are here for clusters that
run DeepSpeed anyway. Stage 3 divides what is large. In every stage the adapter's own values, and
after the backward pass their gradients, are whole on every process (see `base.Parallel`), so
thresholds, scores, clipping and files are those of one process.

ZeRO: arXiv:1910.02054. DeepSpeed's engine is called directly: accelerate drops it on the CPU and
would prepare the model itself. Only this file and `zero_optimizer` import deepspeed.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.adapter_tensors import adapter_parameters
from snell_diffusion.training.parallel.base import Parallel
from snell_diffusion.training.parallel.zero_config import read_settings, require_entrywise


class Zero(Parallel):
    """DeepSpeed's engine over the adapted models.

    Raises:
        SnellaConfigError: DeepSpeed is not installed, or it is asked for something that cannot work
            here (see `zero_config`), or the precision is fp16.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.settings = read_settings()
        if accelerator.mixed_precision == "fp16":
            raise SnellaConfigError(
                "mixed_precision fp16 does not work with DeepSpeed, whose loss scaling is not that "
                "of this trainer; use bf16 or no, or launch without DeepSpeed"
            )
        self._deepspeed = import_deepspeed(self.device)
        self._deepspeed.init_distributed(verbose=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"DeepSpeed ZeRO-{self.settings.stage}"

    @property
    def shares_forward(self) -> bool:  # type: ignore[override]
        return self.settings.stage == 3

    def divide(self, components: Mapping[str, nn.Module]) -> None:
        whole = set(adapter_parameters(components))
        base = [p for model in components.values() for p in model.parameters() if p not in whole]
        self._deepspeed.zero.Init(
            module=nn.ParameterList(base), config_dict_or_path=self._config(components)
        )
        for model in components.values():
            model.to(self.device)

    def _config(self, components: Mapping[str, nn.Module]) -> dict[str, Any]:
        return self.settings.deepspeed_config(
            max(parameter.numel() for parameter in adapter_parameters(components))
        )

    def prepare(
        self, components: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> torch.optim.Optimizer:
        from snell_diffusion.training.parallel.zero_optimizer import ZeroOptimizer

        require_entrywise(optimizer)
        groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        config = self._config(components)
        self._engine, *_ = self._deepspeed.initialize(
            model=_Models(components), optimizer=optimizer, config=config
        )
        if self.settings.stage == 3:
            _keep_whole(adapter_parameters(components))
            for model in components.values():
                _find_borrowed_weights(model)
        return ZeroOptimizer(groups, optimizer.defaults, self._engine)

    def backward(self, loss: Tensor) -> None:
        # The engine prepares its hooks in its own forward pass; the models have run before it.
        self._engine.backward(self._engine(loss), scale_wrt_gas=False)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        from deepspeed.utils import safe_get_full_grad

        for parameter in parameters:
            parameter.grad = safe_get_full_grad(parameter).detach().clone()


class _Models(nn.Module):
    """All adapted models as the one module that an engine takes; hands a loss through."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.components = nn.ModuleDict(components)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def _keep_whole(parameters: Sequence[nn.Parameter]) -> None:
    """Gather adapter tensors now, and outside of the engine's step keep them gathered.

    By itself stage 3 gathers what a module owns when that module is called, which nobody does with
    a container of factors, and drops it after the call, which would leave scores, thresholds and
    averages without values.
    """
    for parameter in parameters:
        parameter.is_external_param = True  # DeepSpeed's mark for "not dropped after a call"
    parameters[0].all_gather(parameters)


def _find_borrowed_weights(model: nn.Module) -> None:
    """While the model runs, a module that reads a weight of another one gets it gathered.

    CLIP's embeddings ask their position table for its length, for example. DeepSpeed does this in
    its engine's forward pass, but our models run outside of it, in pipelines too.
    """

    def switch(on: bool) -> None:
        for module in model.modules():
            module._parameters._in_forward = on  # type: ignore[attr-defined]

    model.register_forward_pre_hook(lambda *_: switch(True))
    model.register_forward_hook(lambda *_: switch(False), always_call=True)


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, with its log at warnings.

    Raises:
        SnellaConfigError: It is not installed.
    """
    # Without a GPU it would look for one with tools that may not be there.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise SnellaConfigError(
            f"DeepSpeed was asked for, but importing it failed ({error}): "
            f"pip install 'snell-diffusion[deepspeed]', or launch without it"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
