"""Puts an adapter's layers into a model and takes them out again, by literal module paths."""

import copy
import gc
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion.adapters.schema import Layer
from snell_diffusion.adapters.state import layer_tensors, live_value
from snell_diffusion.tuners import DeltaLayer, delta_layers
from snell_diffusion.tuners.base import Places
from snell_diffusion.tuners.qkv_guard import release
from snell_diffusion.tuners.spt_selection import is_norm
from snell_diffusion.tuners.traverse import innermost, unwrapped
from snell_diffusion.tuners.weights import device_of, is_linear_like


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their path in the base model, the outermost where tuners wrap each other.

    What a tuner layer has beside the layer it wraps, a LoRA's own matrices for one, is not among
    them: no file may adapt another adapter.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    todo = [("", unwrapped(model))]
    while todo:
        path, module = todo.pop()
        found.setdefault(path, module)
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, BaseTunerLayer):
            todo.append((path, module.base_layer))
            continue
        children = [(f"{path}.{name}" if path else name, m) for name, m in module.named_children()]
        todo += reversed(children)
    return found


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection of garbage for the time of a block.

    Wrapping makes ten thousands of objects that are there to stay; for each few hundred of them the
    collector would walk the whole heap.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def inject(model: nn.Module, config: Any, paths: Iterable[str], adapter_name: str) -> None:
    """Wrap exactly the modules at `paths`; matches no pattern, consumes no random state."""
    target = unwrapped(model)
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        # A second adapter on one model is what we want.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(
            copy.deepcopy(config), target, adapter_name=adapter_name, state_dict=Places(paths)
        )
    if hasattr(type(target), "_hf_peft_config_loaded"):
        target._hf_peft_config_loaded = True  # type: ignore[assignment]


def adaptable(module: nn.Module | None) -> Any:
    """The Conv2d, Linear, Linear-like module or norm that can be adapted, inside of what tuners
    have put around it; None if there is none."""
    if module is None:
        return None
    layer = innermost(module)
    fits = isinstance(layer, nn.Conv2d) or is_linear_like(layer) or is_norm(layer)
    return layer if fits else None


def form_of(layer: Any) -> dict[str, Any]:
    """What a layer table says of a layer's form: kind, shape (O, I), and a kernel's size."""
    if is_norm(layer):
        return {"kind": "norm", "shape": [layer.weight.numel(), 1]}
    if not isinstance(layer, nn.Conv2d):
        return {"kind": "linear", "shape": [layer.out_features, layer.in_features]}
    per_output = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return {
        "kind": "conv2d",
        "shape": [layer.out_channels, per_output],
        "kernel": list(layer.kernel_size),
        "groups": layer.groups,
    }


def form_in(row: Layer) -> dict[str, Any]:
    """The same, as a file has it."""
    form: dict[str, Any] = {"kind": row.kind, "shape": row.shape}
    return form if row.kernel is None else {**form, "kernel": row.kernel, "groups": row.groups}


def blank(form: Mapping[str, Any]) -> nn.Linear | nn.Conv2d | nn.LayerNorm:
    """A layer of a form, on the meta device and without bias."""
    out_features, in_features = form["shape"]
    if form["kind"] == "norm":
        return nn.LayerNorm(out_features, device="meta")
    if form["kind"] == "linear":
        return nn.Linear(in_features, out_features, bias=False, device="meta")
    kernel, groups = form["kernel"], form["groups"]
    channels = in_features // math.prod(kernel) * groups
    return nn.Conv2d(channels, out_features, kernel, groups=groups, bias=False, device="meta")


def zero_layer(form: Mapping[str, Any], device: torch.device | None = None) -> nn.Module:
    """A layer of a form whose weight is one zero, seen everywhere."""
    layer = blank(form)
    zeros = torch.zeros((), device=device).expand(layer.weight.shape)
    layer.weight = nn.Parameter(zeros, requires_grad=False)
    layer.bias = None
    return layer


def stand_in(layer: Any, share: bool) -> nn.Module:
    """A layer of the same form that owns nothing: it shares the weight, or shows one zero for all.

    The zero is on the weight's device: PEFT moves the factors next to it.
    """
    twin = zero_layer(form_of(layer), device_of(layer))
    if share:
        twin.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        zeros = bias.new_zeros(()).expand(bias.shape)
        twin.bias = nn.Parameter(zeros, requires_grad=False)
    return twin


def is_shared(weight: Tensor) -> bool:
    """Whether a stand-in's weight is that of the Linear it stands for."""
    return any(weight.stride())


def skeleton(leaves: Mapping[str, nn.Module]) -> nn.Module:
    """A model that consists of the given modules at the given paths and nothing else."""
    root = nn.Module()
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = root
        for part in parents:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(name, leaf)
    return root


@torch.no_grad()
def fill(layer: DeltaLayer, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors, as a file holds them, into its layer in its own precision.

    A threshold that is not there becomes NaN: it is taken from the sparsity level.
    """
    for name, live in layer_tensors(layer, adapter_name).items():
        if name in tensors:
            live.copy_(live_value(name, tensors[name], name).reshape(live.shape))
        elif name.endswith("_threshold"):
            live.fill_(torch.nan)
    layer.reread(adapter_name)


def activate(model: nn.Module, adapter_names: list[str]) -> None:
    """Make these the active adapters of all layers of our methods, frozen; others go inactive."""
    for _, layer in delta_layers(model):
        layer.set_adapter(adapter_names, inference_mode=True)


def remove_adapter(model: nn.Module, adapter_name: str) -> int:
    """Take one adapter out; layers without any adapter left give way to the module they wrap.

    Args:
        model: Its layers must not be merged.

    Returns:
        How many layers had it.
    """
    target = unwrapped(model)
    count = 0
    for parent in list(target.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, DeltaLayer) or adapter_name not in layer.configs:
                continue
            count += 1
            # PEFT would choose another active adapter by itself and warn about it.
            layer.set_adapter([a for a in layer.active_adapters if a != adapter_name], True)
            layer.delete_adapter(adapter_name)
            if not layer.configs:
                setattr(parent, name, layer.base_layer)
    if count:
        forget(target, adapter_name)
    release(target)
    return count


def forget(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter's config off a model, and with the last one every trace of PEFT."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    configs.pop(adapter_name, None)
    if not configs:
        del model.peft_config
        if "_hf_peft_config_loaded" in vars(model):
            del model._hf_peft_config_loaded
