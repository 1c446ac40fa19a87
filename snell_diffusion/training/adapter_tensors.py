"""The tensors a run changes, by name: every adapter parameter and buffer of the wrapped layers, and
what else is trained, which is all of a model without adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion.training.errors import CheckpointError

Components = Mapping[str, nn.Module]


def tuner_layers(components: Components) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every wrapped layer as (component.module path, layer), in traversal order."""
    for component, model in components.items():
        for name, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                yield f"{component}.{name}", layer


def adapter_tensors(components: Components) -> dict[str, Tensor]:
    """Live tensors of a run by name: parameters and buffers (levels, thresholds) of adapters, and
    trained parameters outside of them; no frozen weight of the base."""
    found = {
        f"{name}.{key}": tensor
        for name, layer in tuner_layers(components)
        for key, tensor in layer.state_dict(keep_vars=True).items()
        if not key.startswith("base_layer.")
    }
    known = {id(tensor) for tensor in found.values()}
    others = trainable_parameters(components).items()
    return found | {name: tensor for name, tensor in others if id(tensor) not in known}


def trainable_parameters(components: Components) -> dict[str, nn.Parameter]:
    """Parameters with gradients on, by component and module path."""
    return {
        f"{component}.{name}": parameter
        for component, model in components.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_parameters(components: Components) -> list[nn.Parameter]:
    """Every adapter's parameters, those included that a method freezes."""
    tensors = (*adapter_tensors(components).values(), *trainable_parameters(components).values())
    found = {tensor: None for tensor in tensors if isinstance(tensor, nn.Parameter)}
    return list(found)


@torch.no_grad()
def copy_adapter_tensors(components: Components, values: Mapping[str, Tensor]) -> None:
    """Set every adapter tensor in place.

    Raises:
        CheckpointError: Names or shapes differ; nothing is changed then.
    """
    live = adapter_tensors(components)
    if live.keys() != values.keys():
        odd = sorted(live.keys() ^ values.keys())
        raise CheckpointError(
            f"the saved adapter does not fit this model: {len(odd)} tensors differ, first {odd[0]}"
        )
    for name, tensor in live.items():
        if tensor.shape != values[name].shape:
            raise CheckpointError(
                f"saved tensor {name} has shape {tuple(values[name].shape)}, "
                f"this model needs {tuple(tensor.shape)}"
            )
    for name, tensor in live.items():
        tensor.copy_(values[name])


def adapter_copies(components: Components) -> dict[str, Tensor]:
    """What `adapter_tensors` hold now; later steps do not change it."""
    return {name: t.detach().clone() for name, t in adapter_tensors(components).items()}


@contextmanager
def applied(components: Components, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other values into the models inside this context; the live ones come back.

    Raises:
        CheckpointError: Names or shapes differ; nothing is changed then.
    """
    live = adapter_copies(components)
    copy_adapter_tensors(components, values)
    try:
        yield
    finally:
        copy_adapter_tensors(components, live)


@contextmanager
def adapters_off(components: Components) -> Iterator[None]:
    """Run the base model alone inside this context."""
    layers = [layer for _, layer in tuner_layers(components)]
    on = [layer for layer in layers if not layer.disable_adapters]
    grads = {p: p.requires_grad for layer in on for p in layer.parameters()}
    for layer in on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)
        for parameter, grad in grads.items():
            parameter.requires_grad_(grad)


@contextmanager
def evaluating(components: Components) -> Iterator[None]:
    """Eval mode and no gradients inside this context; earlier modes come back."""
    modes = {name: model.training for name, model in components.items()}
    for model in components.values():
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, model in components.items():
            model.train(modes[name])
