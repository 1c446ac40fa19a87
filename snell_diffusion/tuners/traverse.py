"""Walks over the delta layers of a model by the module paths its base model has."""

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion.tuners.layer import DeltaLayer

__all__ = [
    *("delta_buffers", "delta_layers", "delta_parameters", "every_module"),
    *("innermost", "unwrapped"),
]


def delta_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, DeltaLayer]]:
    """Every delta layer with its path in the base model, in the model's own order.

    Paths are the base model's, whatever wraps it: no PEFT prefix, no `base_layer` where tuners are
    nested, no prefix of `torch.compile`. Nested delta layers share a path, outermost first.

    Args:
        model: A plain, adapted, `PeftModel` or compiled model.
        adapter: Only layers that have this adapter; None takes all.
    """
    for path, layer in _walk(unwrapped(model), "", set()):
        if adapter is None or adapter in layer.configs:
            yield path, layer


def delta_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by `path.name`, trainable or not, for example `mid.to_q.snella_A`."""
    return {
        name: tensor
        for name, tensor in _delta_tensors(model, adapter)
        if isinstance(tensor, nn.Parameter)
    }


def delta_buffers(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's saved buffers by `path.name`: signs, sparsity levels, thresholds.

    An average of an adapter's parameters (EMA) must take these over as they are: at another level
    the averaged factors are another model.
    """
    return {
        name: tensor
        for name, tensor in _delta_tensors(model, adapter)
        if not isinstance(tensor, nn.Parameter)
    }


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """What `model.modules()` gives, in its order, without passing each module up all levels."""
    seen: set[nn.Module] = set()
    todo = [model]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            yield module
            todo += [child for child in reversed(module._modules.values()) if child is not None]


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model inside `torch.compile`, `PeftModel` and PEFT tuner wrappers."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def innermost(module: nn.Module) -> nn.Module:
    """The module inside of all tuner layers around it, ours or others; itself if there is none."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def _delta_tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    for path, layer in delta_layers(model, adapter):
        for container_name, container in layer.containers():
            if adapter in container:
                yield f"{path}.{container_name}", container[adapter]


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, DeltaLayer]]:
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, BaseTunerLayer):
        if isinstance(module, DeltaLayer):
            yield path, module
        yield from _walk(module.base_layer, path, seen)
        return
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name, seen)
