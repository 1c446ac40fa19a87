"""PELA: low-rank compression of a whole model, and the loss that trains it back (arXiv 2310.10700).

Every Linear becomes two, by truncated SVD. Which ones stay as they are:

- norms, embeddings (patches, positions, time, conditions) and the head, by the names on their path;
- layers with fewer than 10 outputs, and those that the ratio gives rank 0 or no saving;
- Swin's attention outputs, as in the public code, unless `attention_output` says otherwise;
- everything that is not exactly an `nn.Linear` with a weight of its own: convolutions (those of a
  UNet hold most of its weights), quantized and tied layers.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion.compress.low_rank import LowRankLinear, rank_for
from snell_diffusion.errors import SnellaKeyError, SnellaValueError, shown

__all__ = [
    "CompressionReport",
    "compress",
    "low_rank_layers",
    "penalty",
    "tuner_targets",
]

FEWEST_OUTPUTS = 10
_KEPT = re.compile(
    r"norm|embed|time_emb|adaln|modulation|caption_projection|(^|[._])head|classifier"
    r"|^(proj_out|img_in|txt_in|(all_)?final_layer)(\.|$)"
)
"""Paths of Linears that are no ordinary layers; the names after ^ are so at the root only."""
_ATTENTION_OUTPUT = re.compile(r"attention\.(output\.dense|o_proj)$|attn\.proj$")


@dataclass(frozen=True)
class CompressionReport:
    """What became of a model.

    Attributes:
        ratio: The compression ratio asked for.
        ranks: Rank by path of every layer that has two factors now.
        kept: By path, why a Linear stays as it is.
        before: Parameters of the whole model, convolutions included.
        after: The same now.
        convolutions: How many of both are in convolutions, which are never compressed.
    """

    ratio: float
    ranks: Mapping[str, int]
    kept: Mapping[str, str] = field(repr=False)
    before: int
    after: int
    convolutions: int

    def __str__(self) -> str:
        conv = f", {self.convolutions:,} of them in convolutions" if self.convolutions else ""
        return (
            f"{len(self.ranks)} layers compressed at ratio {self.ratio:g}, {len(self.kept)} kept: "
            f"{self.before:,} -> {self.after:,} parameters{conv}"
        )


def compress(
    model: nn.Module,
    ratio: float,
    exclude: Sequence[str] = (),
    attention_output: bool | None = None,
) -> CompressionReport:
    """Replace a model's Linears by `LowRankLinear`s, in place.

    Keep a copy (`copy.deepcopy`) as the teacher. Works on the meta device, for counts.

    Args:
        model: A ViT, Swin, ConvNeXt, UNet, DiT or any other module, without adapters.
        ratio: c, 1 or more: about the factor by which the compressed weights shrink. 2 for DeiT,
            1.5 for Swin in the public code.
        exclude: Further layers to keep, by path or path ending.
        attention_output: Whether attention outputs are compressed too; None: not in Swin.

    Raises:
        SnellaValueError: The ratio is below 1, the model has adapters or is compressed already, or
            nothing in it can be compressed.
        SnellaKeyError: A name of `exclude` fits no Linear.
    """
    if not ratio >= 1:
        raise SnellaValueError(f"the compression ratio must be 1 or more, got {ratio!r}")
    _require_plain(model)
    linears = {p: m for p, m in model.named_modules() if type(m) is nn.Linear}
    unknown = [e for e in exclude if not any(f".{path}".endswith(f".{e}") for path in linears)]
    if unknown:
        raise SnellaKeyError(
            f"exclude names no Linear of {type(model).__name__}: {shown(unknown)}; it has for "
            f"example {shown(linears, 4)}"
        )
    if attention_output is None:
        attention_output = "swin" not in getattr(_config(model), "model_type", "")
    tied = _tied(model)
    before, ranks, kept = _count(model), {}, {}
    for path, linear in linears.items():
        rank = rank_for(linear.in_features, linear.out_features, ratio)
        reason = _reason(path, linear, rank, exclude, attention_output, tied)
        if reason is None:
            ranks[path] = rank
        else:
            kept[path] = reason
    if not ranks:
        raise SnellaValueError(
            f"{type(model).__name__} has no Linear to compress at ratio {ratio:g}; kept: "
            f"{shown(f'{path} ({why})' for path, why in kept.items()) or 'none'}"
        )
    replace(model, ranks)
    convolutions = sum(_count(m) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    return CompressionReport(ratio, ranks, kept, before, _count(model), convolutions)


def replace(model: nn.Module, ranks: Mapping[str, int], empty: bool = False) -> None:
    """Put a `LowRankLinear` in place of each Linear named, in place.

    Args:
        model: Has them.
        ranks: Rank by path.
        empty: Leave the factors uninitialised, for values that are loaded afterwards.

    Raises:
        SnellaKeyError: A path leads to no Linear.
        SnellaValueError: A rank does not fit its layer.
    """
    for path, rank in ranks.items():
        owner, _, name = path.rpartition(".")
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            found = "nothing" if linear is None else type(linear).__name__
            raise SnellaKeyError(
                f"a Linear was expected at {path} of {type(model).__name__}, found {found}"
            )
        make = LowRankLinear.empty_like if empty else LowRankLinear.of
        setattr(model.get_submodule(owner), name, make(linear, rank))


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Every compressed layer with its path in the model's own order."""
    for path, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield path, module


def penalty(
    layers: Iterable[tuple[LowRankLinear, Tensor]], eps: float = 1e-3, hinge: bool = False
) -> Tensor:
    """R, the weight-perturbation term: mean over layers of (max_ij |product - teacher|_ij - eps)^2.

    Only the largest entry of each layer gets a gradient. The square also pulls deviations up to
    eps; with `hinge`, those below eps cost nothing.

    Args:
        layers: Compressed layers, each with the weight (O, I) it had in the teacher.
        eps: Deviation that is let be, 0 or more.
        hinge: Use max(0, max|.| - eps)^2.

    Raises:
        SnellaValueError: There are no layers, or a weight's shape differs.
    """
    terms = []
    for layer, weight in layers:
        if weight.shape != (layer.out_features, layer.in_features):
            raise SnellaValueError(
                f"the teacher's weight must be {(layer.out_features, layer.in_features)} for this "
                f"layer, got {tuple(weight.shape)}"
            )
        over = (layer.product() - weight).abs().max() - eps
        terms.append((over.clamp(min=0) if hinge else over).square())
    if not terms:
        raise SnellaValueError("the perturbation term needs at least one compressed layer")
    return torch.stack(terms).mean()


def tuner_targets(model: nn.Module, names: Sequence[str], whole: bool = True) -> list[str]:
    """Target names for a tuner on top of a compressed model.

    Methods of this package adapt a compressed layer as a whole, under the name it always had: their
    update is a second product beside the factors. PEFT's own know `nn.Linear` only, so they get the
    two factors of each layer.

    Args:
        model: The compressed model.
        names: Layer names or name endings as for the original model.
        whole: True for methods of this package (`Recipe.ours`), False for PEFT's own.

    Returns:
        Paths of layers, to be given as `target_modules`.

    Raises:
        SnellaKeyError: A name fits no Linear, compressed or not.
    """
    found: list[str] = []
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, LowRankLinear))
    }
    for name in names:
        fits = [path for path in layers if f".{path}".endswith(f".{name}")]
        if not fits:
            raise SnellaKeyError(
                f"{type(model).__name__} has no Linear named {name}; it has {shown(layers, 6)}"
            )
        for path in fits:
            split_up = isinstance(layers[path], LowRankLinear) and not whole
            found += [f"{path}.first", f"{path}.second"] if split_up else [path]
    return list(dict.fromkeys(found))


def _reason(
    path: str,
    linear: nn.Linear,
    rank: int,
    exclude: Sequence[str],
    attention_output: bool,
    tied: set[int],
) -> str | None:
    """Why a Linear stays as it is, None if it does not."""
    if any(f".{path}".endswith(f".{name}") for name in exclude):
        return "excluded"
    if _KEPT.search(path):
        return "norm, embedding or head"
    if linear.out_features < FEWEST_OUTPUTS:
        return f"fewer than {FEWEST_OUTPUTS} outputs"
    if not attention_output and _ATTENTION_OUTPUT.search(path):
        return "attention output"
    if id(linear.weight) in tied:
        return "tied weight"
    weights = linear.in_features * linear.out_features
    if rank < 1 or rank * (linear.in_features + linear.out_features) >= weights:
        return "too small"
    return None


def _require_plain(model: nn.Module) -> None:
    wrapped = [path for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if wrapped:
        raise SnellaValueError(
            f"a model to compress must have no adapters, got one on {shown(wrapped, 2)}: merge or "
            "delete them first"
        )
    if any(True for _ in low_rank_layers(model)):
        raise SnellaValueError(
            "the model is compressed already: compress the original at a higher ratio"
        )


def _tied(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _config(model: nn.Module) -> object:
    return getattr(model, "config", None)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
