"""Norms of a base model's weights, read from its files one tensor at a time: no model is loaded."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from snell_diffusion.app.bases import Base

Place = tuple[str, str]  # (component, module path)


def weight_norms(base: Base, places: Sequence[Place]) -> dict[Place, float]:
    """|W| (Frobenius) of the layers whose weights are in the base's safetensors files.

    Quantized weights, and those of a base that is not on this disk, are left out.
    """
    return dict(_norms(base.location, tuple(places)))


@lru_cache(maxsize=64)
def _norms(location: str, places: tuple[Place, ...]) -> tuple[tuple[Place, float], ...]:
    folder = folder_of(location)
    if folder is None:
        return ()
    found = {}
    for component in dict.fromkeys(component for component, _ in places):
        wanted = {f"{path}.weight": (component, path) for name, path in places if name == component}
        found.update(_read(folder / component, wanted))
    return tuple(found.items())


def _read(folder: Path, wanted: dict[str, Place]) -> dict[Place, float]:
    norms: dict[Place, float] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in wanted.keys() & set(tensors.keys()):
                    weight = tensors.get_tensor(name)
                    if weight.is_floating_point():
                        norms[wanted[name]] = float(torch.linalg.vector_norm(weight.double()))
        except (OSError, SafetensorError):  # a file that is being downloaded
            continue
    return norms


def folder_of(location: str) -> Path | None:
    """The folder of a base: itself, or where the hub's cache has it; None where it has not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if Path(location).is_dir():
        return Path(location)
    try:
        return Path(snapshot_download(location, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
