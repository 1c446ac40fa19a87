"""Tensors of PEFT's own methods into a model that has their adapter: all of them, or an error."""

from collections.abc import Mapping

import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from snell_diffusion.errors import SnellaFileError, SnellaKeyError, SnellaShapeError, shown

__all__ = ["fill_peft_adapter"]


def fill_peft_adapter(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, place: str
) -> None:
    """Give a model's adapter the values of a file; on an error the model is as it was.

    PEFT itself leaves what the file lacks at its random start and takes any number.

    Args:
        model: With the adapter injected.
        tensors: By the names that `get_peft_model_state_dict` gives for the model.
        adapter_name: Which of the model's adapters.
        place: What the tensors come from, for messages.

    Raises:
        SnellaKeyError: Tensors that the adapter does not have.
        SnellaShapeError: A tensor of another shape.
        SnellaFileError: Tensors that are missing, or NaN or infinite values.
    """
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
    unknown, missing = sorted({*tensors} - {*expected}), sorted({*expected} - {*tensors})
    if unknown:
        raise SnellaKeyError(
            f"{place}: unknown tensors {shown(unknown, 4)}; use the base it was trained on"
        )
    if missing:
        raise SnellaFileError(
            f"{place}: expected {len(expected)} tensors, {len(missing)} are missing: "
            f"{shown(missing, 4)}; take the file that the run wrote"
        )
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise SnellaShapeError(
                f"{place}: {name}: expected shape {tuple(expected[name].shape)} as in the base, "
                f"got {tuple(value.shape)}; use the base it was trained on"
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise SnellaFileError(f"{place}: tensor {name} holds NaN or infinite values")
    set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter_name)
