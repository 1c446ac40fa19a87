"""Adapters into live models in two phases: check everything, then put in all parts or none.

Phase one (`rehearsal`) rebuilds the adapter on a skeleton, so that what could fail on the model
fails there, while the model is only looked at: names and shapes of all components first, then how
large the updates are. Phase two repeats the same steps on the model; should anything fail even
then, what was put in is taken out again.
"""

import weakref
from dataclasses import dataclass, field
from functools import cached_property

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.attach import (
    activate,
    fill,
    forget,
    inject,
    remove_adapter,
    uncollected,
)
from snell_diffusion.adapters.inspect import numbers_of
from snell_diffusion.adapters.proportion import measured_update, relative_change
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.rehearsal import check_base, check_updates, rehearse, trained_on
from snell_diffusion.adapters.state import Components, config_from, layer_tensors
from snell_diffusion.adapters.tokens import Tokenizers, check_tokens, put_in_tokens, remove_tokens
from snell_diffusion.errors import SnellaKeyError, SnellaValueError, quoted, shown
from snell_diffusion.tuners import DeltaLayer, delta_layers
from snell_diffusion.tuners.traverse import every_module, unwrapped

__all__ = ["LoadReport", "check_adapter_name", "load_adapter"]


@dataclass(frozen=True)
class LoadReport:
    """What a load has done.

    Attributes:
        adapter_name: The name it was loaded under.
        source: The file, hub id or "state dict" it came from.
        layers: Adapted layers by component.
        tensors: How many tensors were read.
        parameters: How many numbers the factors hold.
        base_matches: By component, whether class and config hash are those it was trained on.
        words: The new words that prompts may use.
    """

    adapter_name: str
    source: str
    layers: dict[str, int]
    tensors: int
    parameters: int
    base_matches: dict[str, bool]
    words: tuple[str, ...] = ()
    _live: tuple[weakref.ref[DeltaLayer], ...] = field(default=(), repr=False, compare=False)

    @cached_property
    def largest_update(self) -> float:
        """max over layers of |ΔW| / |W| (Frobenius norms), with no entry of ΔW dropped, where it is
        largest; 0 where W is quantized. One evaluation of every update, at the first look.

        Raises:
            SnellaKeyError: The adapter has been taken out since.
        """
        largest = 0.0
        for reference in self._live:
            layer = reference()
            if layer is None or self.adapter_name not in layer.configs:
                raise SnellaKeyError(
                    f"{self.adapter_name!r} has been unloaded: its updates can be measured only "
                    "while it is there, load it again"
                )
            settings = ("_sparsity", "_threshold")
            tensors = {
                short: tensor.detach()
                for short, tensor in layer_tensors(layer, self.adapter_name).items()
                if not short.endswith(settings)
            }
            if not type(layer).alike:
                largest = max(largest, relative_change(layer, self.adapter_name))
                continue
            config = layer.configs[self.adapter_name]
            largest = max(largest, measured_update(layer.get_base_layer(), config, tensors))
        return largest


@uncollected()
def load_adapter(
    components: Components,
    file: AdapterFile,
    adapter_name: str = "default",
    allow_other_base: bool = False,
    max_relative_update: float = limits.MAX_RELATIVE_UPDATE,
    tokenizers: Tokenizers | None = None,
) -> LoadReport:
    """Put a read adapter into live models and make it the only active one of our methods.

    Args:
        components: Models by the names the file uses, e.g. {"unet": pipe.unet}.
        adapter_name: Letters, digits, "_" and "-", up to 64; not taken.
        allow_other_base: Load although a component's class or config hash differs from the one
            the adapter was trained on. Every layer must still be there with the same shape.
        max_relative_update: Largest accepted |ΔW| / |W| of a layer (Frobenius norms), at any
            sparsity level, and of a new word's embedding against the base's longest.
        tokenizers: By their names in the pipeline; an adapter with new words needs them.

    Raises:
        SnellaKeyError: A component or module of the file is not there, tensors are missing or
            unknown, or the name is taken.
        SnellaShapeError: A module or tensor has another size.
        SnellaBaseError: Another base model.
        SnellaConfigError: Settings this version does not know.
        SnellaValueError: A bad name, a merged or offloaded layer, an update beyond the bound.

        After any of them the models are as they were.
    """
    check_adapter_name(adapter_name)
    for component, part in file.header.components.items():
        if component not in components:
            raise SnellaKeyError(
                f"{file.source}: adapts {component!r} ({trained_on(part)}), expected one of "
                f"{shown(components) or 'no component at all'}: load it into a pipeline of the "
                "kind it was trained for"
            )
    if not max_relative_update > 0:
        raise SnellaValueError(
            f"max_relative_update: expected a number above 0, got {max_relative_update!r}; leave "
            f"it out for {limits.MAX_RELATIVE_UPDATE:g}"
        )
    check_free(components, adapter_name)
    parts = {name: components[name] for name in file.header.components}
    matches = {
        name: check_base(model, name, file, allow_other_base) for name, model in parts.items()
    }
    rehearsed = {name: rehearse(model, name, file, adapter_name) for name, model in parts.items()}
    for name, (layers, shadow) in rehearsed.items():
        check_updates(layers, shadow, name, file, max_relative_update)
    tokens = file.header.tokens
    if tokens is not None:
        check_tokens(
            *(components, tokenizers, tokens, file.tensors, file.source),
            *(allow_other_base, max_relative_update),
        )
    _commit(components, parts, file, adapter_name, tokenizers or {})
    return LoadReport(
        adapter_name=adapter_name,
        source=file.source,
        layers={name: len(part.layers) for name, part in file.header.components.items()},
        tensors=len(file.tensors),
        parameters=sum(map(numbers_of, file.header.components.values())),
        base_matches=matches,
        words=() if tokens is None else tuple(word.text for word in tokens.words),
        _live=tuple(
            weakref.ref(layer)
            for model in parts.values()
            for _, layer in delta_layers(model, adapter_name)
        ),
    )


def check_adapter_name(name: object) -> None:
    """Refuse what cannot name an adapter.

    Raises:
        SnellaValueError: Not a plain name of 1 to 64 characters, or a name torch itself uses.
    """
    if not isinstance(name, str) or not limits.ADAPTER_NAME.fullmatch(name):
        raise SnellaValueError(
            f"adapter_name: expected 1 to 64 letters, digits, '_' or '-', got {quoted(name)}; "
            "choose another"
        )
    if hasattr(nn.ParameterDict(), name):
        raise SnellaValueError(
            f"adapter_name: expected a name that torch does not use itself, got {name!r}; choose "
            f"another, e.g. 'my_{name}'"
        )


def check_free(components: Components, adapter_name: str) -> None:
    """Refuse a name that any tuner, ours or another, has on any of the models.

    Raises:
        SnellaKeyError: The name is taken.
    """
    for component, model in components.items():
        taken = set(getattr(unwrapped(model), "peft_config", None) or {})
        for module in every_module(model):
            if isinstance(module, BaseTunerLayer):
                taken.update(module._get_available_adapters())
        if adapter_name in taken:
            raise SnellaKeyError(
                f"adapter name {adapter_name!r} is already in use on {component!r} "
                f"(there: {shown(taken)}): choose another adapter_name or unload that one first"
            )


def _commit(
    components: Components,
    parts: Components,
    file: AdapterFile,
    adapter_name: str,
    tokenizers: Tokenizers,
) -> None:
    """Phase two. A failure here would be a bug of ours; the models are restored all the same."""
    active = {
        layer: layer.active_adapters[:]
        for model in components.values()
        for _, layer in delta_layers(model)
    }
    try:
        for component, model in parts.items():
            part = file.header.components[component]
            config = config_from(part, component)
            inject(model, config, part.layers, adapter_name)
            filled = set()
            for path, layer in delta_layers(model, adapter_name):
                fill(layer, adapter_name, file.by_layer.get(f"{component}.{path}", {}))
                filled.add(path)
            if filled != set(part.layers):
                raise SnellaKeyError(
                    f"{file.source}: method {part.method} does not adapt "
                    f"{shown(set(part.layers) - filled)} of {component}; load the base it was "
                    "trained on"
                )
        for model in components.values():
            activate(model, [adapter_name])
        if file.header.tokens is not None:
            put_in_tokens(components, tokenizers, file.header.tokens, file.tensors, adapter_name)
    except BaseException:
        remove_tokens(components, tokenizers, adapter_name)
        for model in parts.values():
            remove_adapter(model, adapter_name)
            forget(unwrapped(model), adapter_name)
        for layer, names in active.items():
            layer.set_adapter(names, inference_mode=True)
        raise
