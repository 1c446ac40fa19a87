"""The optimizer of a DeepSpeed run as loop, schedule and checkpoints see it: whole parameters.

DeepSpeed flattens each group's parameters, cuts the result into one slice per process, and steps an
ordinary optimizer on the slice.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn


class ZeroOptimizer(torch.optim.Optimizer):
    """Steps a DeepSpeed engine from whole gradients; saves and loads whole matrices.

    Every process calls every method, with equal arguments.

    Args:
        groups: Parameter groups as they were before DeepSpeed flattened them.
        defaults: Those of the optimizer that the engine steps.
        engine: The engine, over the same parameters in the same groups.
    """

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], engine: Any) -> None:
        super().__init__(groups, defaults)
        self._engine = engine
        self._stage3 = engine.zero_optimization_stage() == 3
        self._world = engine.world_size
        self._rank = engine.global_rank

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    @property
    def _sliced(self) -> torch.optim.Optimizer:
        """What DeepSpeed steps on this process's slices."""
        sliced: torch.optim.Optimizer = self._zero.optimizer
        return sliced

    @property
    def _slices(self) -> list[Tensor]:
        """This process's part of all parameters, flat; in stages 1 and 2 one per group."""
        zero = self._zero
        slices: list[Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self._stage3
            else zero.single_partition_of_fp32_groups
        )
        return slices

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take the gradients from `parameter.grad`, and leave them there for who reads them."""
        parameters = self._parameters()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None
            safe_set_full_grad(parameter, self._padded(gradient))
        self._pass_on(self.param_groups)
        self._engine.step()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def _padded(self, whole: Tensor) -> Tensor:
        """Flat, with zeros up to a multiple of the processes: DeepSpeed cuts without looking."""
        flat = whole.flatten()
        return nn.functional.pad(flat, (0, -flat.numel() % self._world))

    def _pass_on(self, groups: list[dict[str, Any]]) -> None:
        """Give the inner optimizer the learning rates and other settings of these groups."""
        for inner, group in zip(self._sliced.param_groups, groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer's own in one process: whole matrices by the parameters' places."""
        self._link_entries()
        values = {index: self._whole(p) for index, p in enumerate(self._parameters())}
        packed = super().state_dict()
        return {**packed, "state": {index: found for index, found in values.items() if found}}

    def _whole(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {
            key: copied(safe_get_full_optimizer_state(parameter, key) if per_entry else value)
            for key, value, per_entry in self._entries()
        }

    def _entries(self) -> list[tuple[str, Any, bool]]:
        """Key, value and whether it is one number per entry; the same keys for every slice."""
        first = self._slices[0]
        state = self._sliced.state.get(first, {})
        return [
            (key, value, isinstance(value, Tensor) and value.shape == first.shape)
            for key, value in state.items()
        ]

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; the parameters hold the values to continue from."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        parameters = self._parameters()
        for parameter in parameters:
            self._set_master(parameter)
        if not state_dict["state"]:
            return
        self._create_state()
        for index, parameter in enumerate(parameters):
            self._set_entries(parameter, state_dict["state"][index])

    def _create_state(self) -> None:
        """Let the inner optimizer make its tensors: a step with zero gradients and rate changes
        nothing else."""
        still = [{**group, "lr": 0.0} for group in self.param_groups]
        self._pass_on(still)
        for index, flat in enumerate(self._slices):
            flat.grad = torch.zeros_like(flat)
            self._zero._optimizer_step(index)
            flat.grad = None
        self._pass_on(self.param_groups)
        self._link_entries()

    def _link_entries(self) -> None:
        """Let DeepSpeed find every parameter's entries; by itself it forgets all groups but one."""
        if self._stage3 or not self._sliced.state:
            return
        for group, flat in zip(self.param_groups, self._slices, strict=True):
            lazy_init_hp_params_optimizer_state(group["params"], flat, self._sliced.state)

    def _set_master(self, parameter: nn.Parameter) -> None:
        if self._stage3:
            safe_set_local_fp32_param(parameter, self._own(parameter.detach()))
        else:
            safe_set_full_fp32_param(parameter, parameter.detach())

    def _set_entries(self, parameter: nn.Parameter, saved: Mapping[str, Any]) -> None:
        for key, _, per_entry in self._entries():
            if not per_entry:
                for flat in self._slices:
                    self._sliced.state[flat][key] = copied(saved[key])
            elif self._stage3:
                safe_set_local_optimizer_state(parameter, self._own(saved[key]), key)
            else:
                safe_set_full_optimizer_state(parameter, saved[key], key)

    def _own(self, whole: Tensor) -> Tensor:
        """This process's slice of one parameter in stage 3."""
        return self._padded(whole).chunk(self._world)[self._rank]


def copied(value: Any) -> Any:
    """A value that later steps do not change."""
    return value.clone() if isinstance(value, Tensor) else value
