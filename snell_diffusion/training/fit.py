"""Whether a verified checkpoint fits a live run, asked before the first value is changed.

Digests say that the files are those that were written. They do not say that somebody wrote them for
this model: an edited state.json with a new digest verifies too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.training.checkpoints import Checkpoint, Tensors
from snell_diffusion.training.errors import CheckpointError

_STATE_OF = re.compile(r"(\d{1,9})\.(\w+(?:\.\w+)?)")
# What torch's optimizers keep per entry of a parameter; others (rows, blocks, counts) are free.
_PER_ENTRY = {
    "acc_delta",
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "grad_avg",
    "max_exp_avg_sq",
    "max_exp_avg_sqs",
    "momentum_buffer",
    "prev",
    "square_avg",
    "step_size",
    "sum",
}


def require_fit(
    checkpoint: Checkpoint,
    tensors: Tensors,
    state: Mapping[str, Any],
    parameters: Sequence[Tensor],
) -> None:
    """Refuse a checkpoint that a live run cannot continue from exactly.

    Args:
        checkpoint: What was loaded.
        tensors: The live tensors by group and name.
        state: The live plain values.
        parameters: What the optimizer steps, in its order.

    Raises:
        CheckpointError: Names the group, tensor or value that differs, what was expected and what
            came.
    """
    where = f"checkpoint {checkpoint.path} does not fit this run"
    _same_keys(f"{where}: its groups of tensors", tensors, checkpoint.tensors)
    for group in ("adapter", "ema", "best"):
        if group in tensors:
            _same_tensors(f"{where}: {group}", tensors[group], checkpoint.tensors[group])
    _fits_parameters(f"{where}: optimizer", checkpoint.tensors["optimizer"], parameters)
    for key, live in state.items():
        if key not in checkpoint.state:
            raise CheckpointError(f"{where}: state.json has no '{key}'")
        _same_form(f"{where}: state.json {key}", live, checkpoint.state[key])
    _indexed(f"{where}: state.json optimizer", state["optimizer"], checkpoint.state["optimizer"])


def _indexed(where: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Parameters are named by their place: a permuted list would swap their moments."""
    places = [group["params"] for group in live["groups"]]
    found = [group["params"] for group in saved["groups"]]
    if found != places:
        raise _other(f"{where}.groups params", str(places), found)
    known = {str(place) for group in places for place in group}
    for place, values in saved["state"].items():
        if place not in known or not isinstance(values, dict):
            raise _other(f"{where}.state {place}", "a table of one of the parameters", values)


def _same_keys(where: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    missing, extra = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    if missing or extra:
        raise CheckpointError(f"{where}: missing {missing[:4]}, not known here {extra[:4]}")


def _same_tensors(where: str, live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    _same_keys(where, live, saved)
    for name, tensor in live.items():
        came = saved[name]
        if came.shape != tensor.shape or came.dtype != tensor.dtype:
            raise CheckpointError(
                f"{where} tensor {name}: expected {tuple(tensor.shape)} {tensor.dtype}, got "
                f"{tuple(came.shape)} {came.dtype}"
            )


def _fits_parameters(where: str, saved: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> None:
    for name, tensor in saved.items():
        match = _STATE_OF.fullmatch(name)
        if match is None or int(match[1]) >= len(parameters):
            raise CheckpointError(
                f"{where} tensor {name}: expected <parameter 0 to {len(parameters) - 1}>.<name>"
            )
        shape = parameters[int(match[1])].shape
        if match[2] in _PER_ENTRY and tensor.shape != shape:
            raise CheckpointError(
                f"{where} tensor {name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where} tensor {name} holds NaN or infinite values")


def _same_form(where: str, live: Any, saved: Any) -> None:
    """The saved JSON value has the types of the live one, tables and lists included.

    A table may have grown: what an optimizer or a competition gathers is not there at the start.
    """
    if isinstance(live, Mapping):
        if not isinstance(saved, dict):
            raise _other(where, "a table", saved)
        missing = sorted(map(str, live.keys() - saved.keys()))
        if missing:
            raise CheckpointError(f"{where}: missing {missing[:4]}")
        for key, value in live.items():
            _same_form(f"{where}.{key}", value, saved[key])
    elif isinstance(live, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(live):
            raise _other(where, f"a list of {len(live)}", saved)
        for index, value in enumerate(live):
            _same_form(f"{where}[{index}]", value, saved[index])
    elif not _alike(live, saved):
        raise _other(where, type(live).__name__, saved)


def _alike(live: Any, saved: Any) -> bool:
    if type(live) in (int, float):
        return type(saved) in (int, float)
    return type(saved) is type(live)


def _other(where: str, expected: str, saved: Any) -> CheckpointError:
    return CheckpointError(f"{where}: expected {expected}, got {saved!r:.80}")
