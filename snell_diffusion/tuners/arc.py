"""ARC: a low-rank change of normalised inputs, through one projection that all blocks share.

    h' = h + scale · (((h U) s) Uᵀ + b)        after a layer norm, before q, k, v or fc1
    merged:  W' = W (I + scale · U Diag(s) Uᵀ),  bias' = bias + scale · W b      arXiv:2310.06234

Shape legend: D width of h, r rank; U [D, r], s [1, r], b [D]. The formula is in
`snell_diffusion.core.recompose`.

What is shared. Every position (attention, MLP) and width has one U: a vision transformer two, a
UNet two for each width. Every normalised input has one s and one b: q, k and v of a self-attention
read the same and share them. In a diffusion block cross-attention's k and v read the text, which no
norm of the block has seen: they are not adapted, and its q, which reads a norm of its own, has an s
and b of its own. A second stream (SD 3's text) has its own norm, so its own s and b too. A layer
with another role, or none by its name, is adapted alone: its input is its own.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snell_diffusion.core.precision import full, no_autocast
from snell_diffusion.core.recompose import recompose, recomposed_bias, recomposed_weight
from snell_diffusion.tuners.base import DeltaConfig, check_choice, config_field
from snell_diffusion.tuners.containers import PreciseParameterDict
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.offload import onloaded
from snell_diffusion.tuners.placement import PlacedModel
from snell_diffusion.tuners.registry import Method
from snell_diffusion.tuners.roles import block_of, role_of
from snell_diffusion.tuners.transform import TransformLayer

__all__ = ["METHOD", "ArcConfig", "ArcLayer", "ArcModel"]

SHARED_INPUT = ("q", "k", "v")
INITS = ("paper", "identity")


@dataclass
class ArcConfig(DeltaConfig):
    """Settings of ARC.

    The paper's: r 50, dropout 0.1 on the code, AdamW with lr 0.005 to 0.01, gradients clipped at 1.

    Raises:
        SnellaConfigError: A value is out of range.
    """

    method: ClassVar[str] = "ARC"
    default_roles: ClassVar[tuple[str, ...] | None] = ("q", "k", "v", "fc1")

    r: int = config_field(DeltaConfig, "r", 50)
    init: str = field(
        default="paper",
        metadata={
            "help": "'paper': identity at attention inputs, s of MLP inputs Xavier-uniform; "
            "'identity': s is 0 everywhere"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, INITS)

    @classmethod
    def diffusion(cls, **changes: Any) -> "ArcConfig":
        """Our setting for diffusion models, which starts as the base; `changes` win over it."""
        return cls(**{"init": "identity", **changes})


class ArcLayer(TransformLayer):
    """A Linear whose input is recomposed. Dropout drops numbers of the code h U.

    Attributes:
        lenders: By adapter, the layers that hold U, and s and b, where it is not this one.
    """

    adapter_layer_names = ("arc_U", "arc_s", "arc_b")
    alike = False  # only the first of those that share holds what they share
    other_param_names = (*DeltaLayer.other_param_names, "lenders")

    arc_U: PreciseParameterDict
    arc_s: PreciseParameterDict
    arc_b: PreciseParameterDict

    def add_containers(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, PreciseParameterDict())
        # Tuples, which torch does not look into: a module is registered where it is, once.
        self.lenders: dict[str, tuple[ArcLayer, ArcLayer]] = {}

    def adopt(self, key: str) -> None:
        super().adopt(key)
        self._role = role_of(key)

    def create_tensors(
        self, adapter: str, config: DeltaConfig, generator: torch.Generator | None
    ) -> None:
        assert isinstance(config, ArcConfig)
        D, r = self.in_features, config.r
        bound_U, bound_s = math.sqrt(6 / (D + r)), math.sqrt(6 / (1 + r))
        U = torch.empty(D, r).uniform_(-bound_U, bound_U, generator=generator)
        s = torch.zeros(1, r)
        if config.init == "paper" and self._role == "fc1":
            s.uniform_(-bound_s, bound_s, generator=generator)
        self.arc_U[adapter] = nn.Parameter(U)
        self.arc_s[adapter] = nn.Parameter(s)
        self.arc_b[adapter] = nn.Parameter(torch.zeros(D))

    def borrow(self, adapter: str, projection: "ArcLayer", own: "ArcLayer") -> None:
        """Read U of one layer and s and b of another in place of this layer's own, dropping these.

        Args:
            adapter: One that all three have.
            projection: Holds U, of this layer's width; may be this layer.
            own: Holds s and b; may be this layer.
        """
        if projection is not self:
            del self.arc_U[adapter]
        if own is not self:
            del self.arc_s[adapter]
            del self.arc_b[adapter]
        self.lenders[adapter] = (projection, own)

    def parts(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """U [D, r], s [1, r] and b [D], wherever they are held."""
        projection, own = self.lenders.get(adapter, (self, self))
        return projection.arc_U[adapter], own.arc_s[adapter], own.arc_b[adapter]

    def transformed(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        with no_autocast(x.device):
            h = full(x)
            added = torch.zeros_like(h)
            for name in adapters:
                U, s, b = (part.to(h.device, h.dtype) for part in self.parts(name))
                dropout = self.configs[name].dropout if self.training else 0.0
                added = added + self.scaling[name] * recompose(h, U, s, b, dropout)
            h = (h + added).to(x.dtype)
        return self.base_layer(h, *args, **kwargs)

    def merged_parameters(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        base = self.get_base_layer()
        W: Tensor = full(base.weight)
        weight = W
        bias: Tensor = W.new_zeros(len(W)) if base.bias is None else full(base.bias)
        for name in adapters:
            U, s, b = (part.to(W) for part in self.parts(name))
            weight = weight + self.scaling[name] * recomposed_weight(W, U, s)
            bias = bias + self.scaling[name] * recomposed_bias(W, b)
        return {"weight": weight, "bias": bias}

    def _onloaded(self) -> AbstractContextManager[None]:
        layers = dict.fromkeys((self, *chain.from_iterable(self.lenders.values())))
        return onloaded(child for layer in layers for _, child in layer.containers())


class ArcModel(PlacedModel):
    """PEFT's model class for ARC; knows which layers share what while it puts them in."""

    prefix = "arc_"
    tuner_layer_cls = ArcLayer
    conv_layer_cls = ArcLayer
    no_convolutions = "ARC recomposes the features of tokens after a layer norm"

    def _adapt(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if reads_the_context(parent, current_key):
            return
        super()._adapt(peft_config, adapter_name, target, target_name, parent, current_key)
        self._share(getattr(parent, target_name), adapter_name, current_key)

    def _share(self, layer: ArcLayer, adapter: str, path: str) -> None:
        """Let a fresh layer borrow from the first of its position and of its input."""
        together, width = role_of(path) in SHARED_INPUT, layer.in_features
        position = "attention" if together else "mlp"
        projection = self._holder("arc_U", (adapter, position, width), layer)
        own = self._holder("arc_s", (adapter, block_of(path) if together else path, width), layer)
        if projection is not layer or own is not layer:
            layer.borrow(adapter, projection, own)

    def _holder(
        self, container: str, key: tuple[str, str | None, int], layer: ArcLayer
    ) -> ArcLayer:
        """The layer that holds what a key stands for; this one if none does yet."""
        holders: dict[Any, ArcLayer] = self.__dict__.setdefault("_holders", {})
        held = holders.get((container, key))
        if held is None or key[0] not in getattr(held, container):
            held = holders[container, key] = layer
        return held


METHOD = Method(
    name="ARC",
    config=ArcConfig,
    model=ArcModel,
    summary="normalised inputs recomposed through one projection that all blocks share",
)


def reads_the_context(attention: nn.Module, path: str) -> bool:
    """Whether a Linear is a key or value projection that reads the text, not a norm of the block.

    Diffusers says which attentions those are; elsewhere a width other than the queries' tells. The
    added projections of a second stream read its norm, unless the stream has no queries.
    """
    if role_of(path) not in ("k", "v"):
        return False
    prefix, _, name = path.rpartition(".")
    if name.startswith("add_"):
        return getattr(attention, "add_q_proj", None) is None
    if getattr(attention, "is_cross_attention", False):
        return True
    queries = (c for n, c in attention.named_children() if role_of(f"{prefix}.{n}") == "q")
    width = getattr(attention, name).in_features
    return any(q.in_features != width for q in queries if getattr(q, "in_features", 0))
