"""Which entries of each weight a trained method changes: the map of kept weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.loaded import models_of
from snell_diffusion.training.adapter_tensors import tuner_layers
from snell_diffusion.training.files import write_with
from snell_diffusion.training.plots import place_of

KEPT = "kept.png"
"""Name of the picture in a run folder."""


@torch.no_grad()
def updates(pipe: Any) -> Iterator[tuple[str, Tensor]]:
    """(component.module path, ΔW) of every adapted layer, float32 [O, ...] on the CPU.

    ΔW is what merging would add to the weight. Layers whose method adds no matrix are left out, and
    norms, whose weight is none.
    """
    for name, layer in tuner_layers(models_of(pipe)):
        found = _update(layer)
        if found is not None and found.dim() > 1:
            yield name, found.to_dense().float().cpu()


def _update(layer: Any) -> Tensor | None:
    (adapter, *_) = layer.active_adapters or [None]
    if adapter is None:
        return None
    if hasattr(layer, "merged_parameters"):
        try:
            weight = layer.merged_parameters([adapter]).get("weight")
        except ValueError:
            return None
        return None if weight is None else weight - layer.get_base_layer().weight.to(weight)
    try:
        found: Tensor = layer.get_delta_weight(adapter)
    except (AttributeError, KeyError, NotImplementedError, ValueError):
        return None
    return found


def kept_entries(pipe: Any) -> list[list[Any]]:
    """[layer, entries that change, entries] through the network; none for a dense method.

    A method is dense where every layer's update has no zero but by chance: 99.9 % of all entries
    or more.
    """
    rows = [[name, int((u != 0).sum()), u.numel()] for name, u in updates(pipe)]
    kept, size = sum(row[1] for row in rows), sum(row[2] for row in rows)
    if kept >= 0.999 * size:
        return []
    return sorted(rows, key=lambda row: place_of(row[0]))


def kept_picture(pipe: Any, layer: str, path: Path) -> None:
    """Write which entries of one layer's update are not zero, as a black and white PNG.

    A pixel is an entry: rows are outputs, columns inputs; dark = changed.
    """
    for name, update in updates(pipe):
        if name == layer:
            mask = (update.flatten(1) == 0).to(torch.uint8) * 255
            picture = Image.fromarray(mask.numpy()).convert("1")
            write_with(path, picture.save, durable=False)
