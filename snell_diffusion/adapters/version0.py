"""Files of the development version, which stored two things in float64: they are brought to 1.0.

    <layer>.snella_sparsity     F64 []     now F32 [3]       (`doubles`)
    <component>.snella_method   F64 [4]    now F32 [4, 3]

Nothing else in them differs, their format text is 1.0 too, and no other F64 tensor is read.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from snell_diffusion.adapters.doubles import split_doubles

__all__ = ["is_version0", "migrated"]

_SHAPES = {"snella_sparsity": (), "snella_method": (4,)}


def is_version0(name: str, shape: Sequence[int]) -> bool:
    """Whether a float64 tensor of this name and shape is one of the development version's."""
    return _SHAPES.get(name.rpartition(".")[2]) == tuple(shape)


def migrated(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors in format 1.0, those of the development version split; one warning if any.

    Raises:
        SnellaValueError: A number that format 1.0 cannot hold.
    """
    old = [name for name, tensor in tensors.items() if tensor.dtype == torch.float64]
    if not old:
        return dict(tensors)
    parts = {
        name: split_doubles(
            tensors[name], f"{source}: tensor {name!r}", "use another checkpoint of this adapter"
        )
        for name in old
    }
    warnings.warn(
        f"{source}: written by a development version of snell_diffusion ({len(old)} F64 tensors); "
        "it was read exactly, but save it again: later versions may not read it",
        stacklevel=2,
    )
    return {**tensors, **parts}
