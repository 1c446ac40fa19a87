"""Any torch-style optimizer by name or import path, and its state without pickle."""

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.config_types import named_values
from snell_diffusion.training.errors import CheckpointError

# The optional dependencies that hold optimizers, by their import name.
_EXTRAS = {"bitsandbytes": "quant", "prodigyopt": "prodigy"}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Find an optimizer: `AdamW` means torch.optim.AdamW, otherwise an import path.

    Raises:
        SnellaConfigError: No such class, or it is not an optimizer.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "torch.optim"), attribute)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(module.partition(".")[0])
        if extra is None:
            raise _not_found(name, error) from error
        raise SnellaConfigError(
            f"optimizer '{name}' needs a package that is not installed: "
            f"pip install 'snell-diffusion[{extra}]'"
        ) from error
    except (ImportError, AttributeError) as error:
        raise _not_found(name, error) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise SnellaConfigError(f"optimizer '{name}' is not a torch.optim.Optimizer class")
    return found


def _not_found(name: str, error: Exception) -> SnellaConfigError:
    return SnellaConfigError(
        f"optimizer '{name}' was not found ({error}); give a class of torch.optim such as AdamW, "
        f"or an import path such as bitsandbytes.optim.AdamW8bit"
    )


def make_optimizer(
    name: str,
    groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    arguments: Iterable[str] = (),
) -> torch.optim.Optimizer:
    """Build an optimizer over parameter groups.

    Args:
        name: See `optimizer_class`.
        groups: Parameter groups with their own lr and weight_decay.
        defaults: Arguments passed on where the class takes them (betas, eps, ...).
        arguments: `name=value` strings, values as Python literals; they win and must be known.

    Raises:
        SnellaConfigError: Unknown optimizer, arguments it refuses, or rates it cannot have.
    """
    cls = optimizer_class(name)
    known = inspect.signature(cls).parameters
    options = {key: value for key, value in defaults.items() if key in known}
    options |= named_values(arguments)
    try:
        optimizer = cls(list(groups), **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise SnellaConfigError(f"optimizer '{name}' refused its arguments: {error}") from error
    require_one_rate(optimizer)
    return optimizer


def own_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The estimate `d` by which an optimizer scales its learning rate; None where it has none.

    Prodigy (arXiv:2306.06101) keeps it in its groups, with its start `d0`, and steps by lr * d.
    """
    group = optimizer.param_groups[0]
    return float(group["d"]) if "d0" in group else None  # Adafactor's `d` is a threshold


def require_one_rate(optimizer: torch.optim.Optimizer) -> None:
    """Refuse groups with different rates for an optimizer that estimates one for all.

    Raises:
        SnellaConfigError: Names the rates.
    """
    rates = {group["lr"] for group in optimizer.param_groups} - {0.0}
    if own_rate(optimizer) is not None and len(rates) > 1:
        raise SnellaConfigError(
            f"optimizer {type(optimizer).__name__} estimates one learning rate for all tensors, "
            f"but the groups have {', '.join(map(str, sorted(rates)))}: leave out "
            f"scalar_learning_rate and text_encoder_lr, and set learning_rate 1.0"
        )


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into named tensors and plain JSON values.

    Raises:
        CheckpointError: Its state holds something that is neither (it cannot be saved exactly).
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            elif _is_table(value):
                tensors |= {f"{index}.{key}.{name}": tensor for name, tensor in value.items()}
            elif value is None or isinstance(value, (bool, int, float, str)):
                plain.setdefault(str(index), {})[key] = value
            else:
                raise CheckpointError(
                    f"optimizer {type(optimizer).__name__} keeps a {type(value).__name__} in "
                    f"'{key}', which a checkpoint cannot hold; set checkpointing_steps off or "
                    f"choose another optimizer"
                )
    return tensors, {"state": plain, "groups": state["param_groups"]}


def _is_table(value: Any) -> bool:
    """bitsandbytes keeps the tensors of its 8-bit moments one level further down."""
    return isinstance(value, dict) and all(isinstance(part, Tensor) for part in value.values())


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Restore what `pack_optimizer` returned into an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in plain["state"].items()}
    for name, tensor in tensors.items():
        index, *path, key = name.split(".")
        entries = state.setdefault(int(index), {})
        for table in path:
            entries = entries.setdefault(table, {})
        entries[key] = tensor
    live = optimizer.state_dict()["param_groups"]
    if len(live) != len(plain["groups"]):
        raise CheckpointError(
            f"the checkpoint has {len(plain['groups'])} parameter groups, this run {len(live)}"
        )
    groups = [
        {key: _like(value, now.get(key)) for key, value in saved.items()}
        for saved, now in zip(plain["groups"], live, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(value: Any, live: Any) -> Any:
    """JSON turns tuples into lists; give back the type that the optimizer had."""
    return tuple(value) if isinstance(live, tuple) else value
