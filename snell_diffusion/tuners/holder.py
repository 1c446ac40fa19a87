"""The adapters of one layer: their names, settings and tensors, and how strong each is."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from snell_diffusion.tuners.offload import compute_device
from snell_diffusion.tuners.scale import CallScale
from snell_diffusion.tuners.weights import HALVES

if TYPE_CHECKING:
    from snell_diffusion.tuners.base import DeltaConfig

__all__ = ["AdapterHolder"]


class AdapterHolder(nn.Module, BaseTunerLayer):
    """A layer around another that keeps adapters; what they do is a subclass's.

    Attributes:
        r: Rank by adapter.
        scaling: Factor on each adapter's update now: `config.scale` times the weight given to
            `set_scale` times the call-time factors of `scale_layer`. Change it by those methods.
        configs: Config by adapter.
    """

    other_param_names: tuple[str, ...] = ("r", "scaling", "configs", "weights")

    if TYPE_CHECKING:  # from peft's mixin, which has no types; torch's __getattr__ would hide them
        active_adapters: list[str]
        get_base_layer: Callable[[], nn.Linear]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        # In a loaded pipeline (eval mode) a fresh layer must neither drop inputs nor recompute.
        self.training = base_layer.training
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.configs: dict[str, DeltaConfig] = {}
        self.weights: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._call_scale = CallScale()
        self._active_adapter = adapter_name

    @abstractmethod
    def add_containers(self) -> None:
        """Create the empty per-adapter containers named in `adapter_layer_names`."""

    @abstractmethod
    def create_tensors(
        self, adapter: str, config: "DeltaConfig", generator: torch.Generator | None
    ) -> None:
        """Fill the containers for a new adapter, in float32 on the CPU."""

    @abstractmethod
    def clear_cache(self) -> None:
        """Drop what is kept of the adapters' effect: they change."""

    # Adapters

    def update_layer(self, adapter_name: str, config: "DeltaConfig", key: str) -> None:
        """Add an adapter.

        Args:
            adapter_name: Not yet in this layer, without dots.
            config: Its settings; `config.seed` makes the start a function of seed and `key`.
            key: The module's path in its model.

        Raises:
            ValueError: The name cannot be used.
        """
        self._check_name(adapter_name)
        self.clear_cache()
        self.r[adapter_name] = config.r
        self.configs[adapter_name] = config
        self.weights[adapter_name] = 1.0
        self._refresh_scaling()
        self.create_tensors(adapter_name, config, layer_generator(config.seed, key))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_name(self, name: str) -> None:
        if name in self.configs:
            raise ValueError(f"adapter {name!r} already exists in this layer; delete it first")
        if not name or "." in name or hasattr(nn.ParameterDict(), name):
            raise ValueError(
                f"adapter name {name!r} cannot be used: it must not be empty, contain a dot or be "
                "the name of a torch attribute; use letters, digits, '_' and '-'"
            )

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before deleting it")
        super().delete_adapter(adapter_name)
        self.clear_cache()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        before = self.active_adapters[:]
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if self.active_adapters != before:
            self.clear_cache()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter next to its base weight; unlike PEFT's own, keep it in full precision."""
        device = device or compute_device(self.get_base_layer())
        if device.type == "meta":
            return
        for _, container in self.containers():
            if adapter_name not in container or container[adapter_name].device.type == "meta":
                continue
            tensor = container[adapter_name]
            dtype = torch.float32 if tensor.dtype in HALVES else tensor.dtype
            if tensor.device != device or tensor.dtype != dtype:
                container[adapter_name] = tensor.to(device=device, dtype=dtype)

    def containers(self) -> Iterator[tuple[str, Any]]:
        """The per-adapter dictionaries of parameters and buffers by attribute name."""
        return (item for item in self.named_children() if item[0] != "base_layer")

    def _applicable(self) -> tuple[str, ...]:
        return tuple(name for name in self.active_adapters if name in self.configs)

    # Scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's weight; its update is multiplied by `config.scale * scale`.

        Adapters this layer does not have are ignored: PEFT and diffusers call every layer.
        """
        if adapter not in self.weights:
            return
        if not self._call_scale.ends_zero_call(adapter):
            self.weights[adapter] = float(scale)
        self._refresh_scaling()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of this layer for the time of a call, until `unscale_layer`."""
        self._call_scale.push(scale, self._applicable())
        self._refresh_scaling()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)` exactly; None undoes all of them."""
        self._call_scale.pop(scale)
        self._refresh_scaling()

    def _refresh_scaling(self) -> None:
        for adapter, weight in self.weights.items():
            factor = self._call_scale.product()
            self.scaling[adapter] = self.configs[adapter].scale * weight * factor


def layer_generator(seed: int | None, key: str) -> torch.Generator | None:
    """A CPU generator that depends on seed and module path alone; None is torch's global one.

    Hashing the path makes a layer's start independent of which other layers are adapted.
    """
    if seed is None:
        return None
    digest = sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
