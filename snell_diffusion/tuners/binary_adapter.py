"""Bi-AdaptFormer: an adapter beside the MLP whose matrices are stored in one bit (or 2, 4, 8).

    x + mlp(ln x) + scale · q(up) dropout(relu(q(down) x))               arXiv:2307.16867

Shape legend: D width of the block, r rank; x [..., D] before the norm; down [r, D], up [D, r].
Trained are float latents; q (`core.quantize`) maps them to levels in every forward pass, straight
through for gradients.

The layer wraps the MLP's output Linear and adds to what it returns; x comes from a hook on the norm
that feeds the MLP. What the block does with the MLP's output, a gate or a layer scale, it does with
the adapter's as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from snell_diffusion.core.bottleneck import bottleneck
from snell_diffusion.core.precision import full, no_autocast
from snell_diffusion.errors import SnellaConfigError, SnellaValueError, shown
from snell_diffusion.tuners.base import DeltaConfig
from snell_diffusion.tuners.containers import PreciseParameterDict
from snell_diffusion.tuners.few_bits import FewBitsConfig, fresh_pair, used
from snell_diffusion.tuners.placement import PlacedModel, linears
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.roles import block_of, role_of
from snell_diffusion.tuners.transform import TransformLayer

__all__ = ["METHOD", "BinaryAdapterConfig", "BinaryAdapterLayer", "BinaryAdapterModel"]

NORMS = (
    *("layernorm_after", "layer_norm2"),  # transformers: ViT and Swin, CLIP
    *("norm3", "norm2"),  # diffusers, whose blocks with cross-attention have three
    *("layernorm", "post_attention_layernorm"),  # ConvNeXt, Llama-like encoders
)
CONTEXT_NORMS = ("norm2_context",)
"""Names a block may have for the norm before its MLP, the first that is there is meant; and for
that of a second stream."""


@dataclass
class BinaryAdapterConfig(FewBitsConfig):
    """Settings of Bi-AdaptFormer.

    The paper's: r 32 or 1, dropout 0.1, scale by task out of 0.01, 0.1, 1, 10, 100.
    """

    method: ClassVar[str] = "BINARY_ADAPTER"
    default_roles: ClassVar[tuple[str, ...] | None] = ("fc2",)


class Seen:
    """A hook on a norm that keeps its input until the layer behind the MLP takes it."""

    def __init__(self, layer: "BinaryAdapterLayer") -> None:
        self.layer = layer
        self.x: Tensor | None = None

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        idle = self.layer.disable_adapters or not self.layer.acting()
        self.x = None if idle else args[0] if args else next(iter(kwargs.values()), None)

    def take(self) -> Tensor | None:
        """The input, which is not kept any longer."""
        x, self.x = self.x, None
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "x": None}


class BinaryAdapterLayer(TransformLayer):
    """The output Linear of an MLP, with adapters beside that MLP. Not mergeable.

    Raises:
        SnellaConfigError: (in a call) No norm was found that feeds the MLP.
        SnellaValueError: (in a call) The norm's input is not of the shape of the MLP's output.
    """

    adapter_layer_names = ("binary_adapter_down", "binary_adapter_up")
    packed_names = adapter_layer_names
    alike = False
    mergeable = False

    binary_adapter_down: PreciseParameterDict
    binary_adapter_up: PreciseParameterDict

    def add_containers(self) -> None:
        self.binary_adapter_down = PreciseParameterDict()
        self.binary_adapter_up = PreciseParameterDict()
        self.seen: Seen | None = None
        self._hook: Any = None

    def adopt(self, key: str) -> None:
        super().adopt(key)
        self.path = key

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        assert isinstance(config, BinaryAdapterConfig)
        down, up = fresh_pair(self.out_features, self.out_features, config, generator)
        self.binary_adapter_down[adapter] = nn.Parameter(down)
        self.binary_adapter_up[adapter] = nn.Parameter(up)

    def watch(self, norm: nn.Module) -> None:
        """Read what goes into a norm from now on, in place of an earlier one."""
        self.unwatch()
        self.seen = Seen(self)
        self._hook = norm.register_forward_pre_hook(self.seen, with_kwargs=True)

    def unwatch(self) -> None:
        """Take the hook off again."""
        if self._hook is not None:
            self._hook.remove()
        self.seen = self._hook = None

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not self.configs:
            self.unwatch()

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """down and up as a call multiplies by them."""
        config = self.configs[adapter]
        assert isinstance(config, BinaryAdapterConfig)
        down, up = self.binary_adapter_down[adapter], self.binary_adapter_up[adapter]
        return used(down, config), used(up, config)

    def transformed(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        block_input = self._block_input(y)
        with no_autocast(x.device):
            for name in adapters:
                down, up = self.matrices(name)
                dropout = self.configs[name].dropout if self.training else 0.0
                read = full(block_input).to(down.device, down.dtype)
                added = bottleneck(read, down, up, activation="relu", dropout=dropout)
                y = y + (self.scaling[name] * added).to(y.dtype)
        return y

    def why_not_mergeable(self) -> str:
        return (
            "Bi-AdaptFormer cannot be merged: its adapters have a ReLU and read another tensor "
            "than the layer they are at, which no weight can hold; use the adapter unmerged, or "
            "Bi-LoRA"
        )

    @torch.no_grad()
    def update_size(self, adapter: str) -> float:
        """Frobenius norm of scale · q(up) q(down), which is the adapter without its ReLU."""
        with self._onloaded():
            down, up = self.matrices(adapter)
            return abs(self.scaling[adapter]) * float(torch.linalg.vector_norm(up @ down))

    def _block_input(self, y: Tensor) -> Tensor:
        if self.seen is None:
            raise SnellaConfigError(no_norm(self.path))
        x = self.seen.take()
        if x is None or x.shape != y.shape:
            raise SnellaValueError(
                f"Bi-AdaptFormer adds to the output of {self.path}, {list(y.shape)}, what it "
                "computes from the input of the norm before the MLP, "
                + ("which did not run before it" if x is None else f"{list(x.shape)}")
                + ": this block is put together in another way; use Bi-LoRA"
            )
        return x


class BinaryAdapterModel(PlacedModel):
    """PEFT's model class for Bi-AdaptFormer; knows the norm before each MLP."""

    prefix = "binary_adapter_"
    tuner_layer_cls = BinaryAdapterLayer
    conv_layer_cls = BinaryAdapterLayer
    no_convolutions = "Bi-AdaptFormer adds to the output of an MLP's Linear"

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        targets = [p for p in linears(model) if check_target_module_exists(peft_config, p)]
        lost = [path for path in targets if norm_before(model, path) is None]
        if lost:
            raise SnellaConfigError(no_norm(shown(lost)))

    def _adapt(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        super()._adapt(peft_config, adapter_name, target, target_name, parent, current_key)
        layer, norm = getattr(parent, target_name), norm_before(self.model, current_key)
        # Where an adapter's file is tried out there is nothing but the layers.
        if norm is not None and layer.seen is None:
            layer.watch(norm)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(child, BinaryAdapterLayer):
            child.unwatch()


METHOD = Method(
    name="BINARY_ADAPTER",
    config=BinaryAdapterConfig,
    model=BinaryAdapterModel,
    summary="Bi-AdaptFormer: adapters of 1, 2, 4 or 8 bits beside the MLPs, not mergeable",
)


def norm_before(model: nn.Module, path: str) -> nn.Module | None:
    """The norm that feeds the MLP whose output Linear is at a path, by the names that blocks use.

    None for a path that is no MLP's output, or a block without such a norm.
    """
    if role_of(path) != "fc2":
        return None
    block = block_of(path) or ""
    names = CONTEXT_NORMS if "ff_context" in path.split(".") else NORMS
    for owner in (block, block.rpartition(".")[0]):
        module = model.get_submodule(owner)
        for name in names:
            norm = getattr(module, name, None)
            if isinstance(norm, nn.Module):
                return norm
    return None


def no_norm(paths: str) -> str:
    return (
        f"Bi-AdaptFormer reads the input of the norm before an MLP and adds to the MLP's output: "
        f"{paths} is no MLP's output by its name, or has no norm of a known name in its block "
        f"({', '.join((*NORMS, *CONTEXT_NORMS))}); set target_modules to such layers (fc2, ff.net.2"
        "), or use Bi-LoRA"
    )
