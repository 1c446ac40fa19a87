"""The methods that are compared, each put into a model that shares its frozen weights with others.

base        the frozen model, forward pass alone
full        every weight of the model trained
lora        PEFT's LoRA, factors in the precision of the base
lora_fp32   the same with float32 factors on a 16-bit base, PEFT's default there
dora        PEFT's DoRA
shira       PEFT's SHiRA: as many single entries, chosen at random
plain       SNELLA as the public code computes it (`plain`)
plain_kept  the same without its recomputation of the branch
ours        SNELLA as this package computes it by default
fused       SNELLA through the fused GPU kernels
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.plain import make_plain
from snell_diffusion.core.triton import fused
from snell_diffusion.tuners import SnellaConfig
from snell_diffusion.tuners.grouping import group_small_layers

ADAPTER = "default"
LORA_RANK, SNELLA_RANK = 16, 32
SPARSITY = 0.5  # what the competition ends at by default


@dataclass(frozen=True)
class Ranks:
    """Columns of the factors by method family.

    LoRA's usual 16 beside SNELLA's own 32 is the comparison of most tables; `equal(r)` has as many
    numbers per layer in both.
    """

    lora: int = LORA_RANK
    snella: int = SNELLA_RANK

    @classmethod
    def equal(cls, r: int) -> "Ranks":
        return cls(r, r)


USUAL = Ranks()


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares every parameter and buffer with it."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def adapt(
    model: nn.Module, method: str, targets: Sequence[str], ranks: Ranks = USUAL, seed: int = 0
) -> nn.Module:
    """Put a method into a model, in training mode; the model itself is changed.

    Args:
        model: Its parameters may be shared with a `twin`: only "full" makes new ones, on the same
            memory.
        method: One of METHODS.
        targets: Paths or endings of the Linear layers to adapt.
        ranks: Columns of the factors.
        seed: Of the fresh factors.

    Raises:
        ValueError: Unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    torch.manual_seed(seed)
    if method == "full":
        _own_parameters(model)
    else:
        model.requires_grad_(False)
        METHODS[method](model, list(targets), ranks)
    return model.train()


def _base(model: nn.Module, targets: list[str], ranks: Ranks) -> None:
    """Nothing is trained."""


def _full(model: nn.Module, targets: list[str], ranks: Ranks) -> None:
    """Everything is trained; `adapt` does it."""


def _own_parameters(model: nn.Module) -> None:
    """New parameters on the memory of the shared ones, so that their twins stay frozen."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach())


def _peft(
    config: Callable[[list[str], Ranks], PeftConfig], wide: bool = False
) -> Callable[[nn.Module, list[str], Ranks], None]:
    """A PEFT method with its numbers in float32 (`wide`) or in the precision of the base."""

    def put(model: nn.Module, targets: list[str], ranks: Ranks) -> None:
        dtype = torch.float32 if wide else next(model.parameters()).dtype
        inject_adapter_in_model(config(targets, ranks), model, ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    return put


def _lora(targets: list[str], ranks: Ranks) -> PeftConfig:
    return LoraConfig(r=ranks.lora, lora_alpha=ranks.lora, target_modules=targets)


def _dora(targets: list[str], ranks: Ranks) -> PeftConfig:
    return LoraConfig(r=ranks.lora, lora_alpha=ranks.lora, target_modules=targets, use_dora=True)


def _shira(targets: list[str], ranks: Ranks) -> PeftConfig:
    # Torch warns of unchecked sparse tensors unless one says that they shall stay unchecked.
    torch.sparse.check_sparse_tensor_invariants.disable()
    return ShiraConfig(r=ranks.lora, target_modules=targets, random_seed=0)


def _ours(model: nn.Module, targets: list[str], ranks: Ranks) -> None:
    """As the training script does it."""
    _snella(model, targets, ranks)
    group_small_layers(model)


def _snella(model: nn.Module, targets: list[str], ranks: Ranks) -> None:
    config = SnellaConfig.paper(
        r=ranks.snella, target_modules=targets, init_sparsity=SPARSITY, seed=0
    )
    inject_adapter_in_model(config, model, ADAPTER)


def _plain(model: nn.Module, targets: list[str], ranks: Ranks) -> None:
    _snella(model, targets, ranks)
    make_plain(model, ADAPTER)


def _plain_kept(model: nn.Module, targets: list[str], ranks: Ranks) -> None:
    _snella(model, targets, ranks)
    make_plain(model, ADAPTER, checkpointed=False)


METHODS: dict[str, Callable[[nn.Module, list[str], Ranks], None]] = {
    "base": _base,
    "full": _full,
    "lora": _peft(_lora),
    "lora_fp32": _peft(_lora, wide=True),
    "dora": _peft(_dora),
    "shira": _peft(_shira),
    "plain": _plain,
    "plain_kept": _plain_kept,
    "ours": _ours,
    "fused": _ours,
}


def unavailable(method: str, device: torch.device) -> str | None:
    """Why a method cannot run on a device; None where it can."""
    if method != "fused" or (device.type == "cuda" and fused.available(device)):
        return None
    return "the fused kernels need an NVIDIA GPU and the package triton"


def path(method: str) -> AbstractContextManager[None]:
    """A context in which our layers compute as the method says: "ours" leaves fused kernels out."""
    return fused.switched_off() if method == "ours" else nullcontext()


def trained_bytes(model: nn.Module) -> int:
    """Bytes of what a method trains: the adapter, or with "full" the model."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
