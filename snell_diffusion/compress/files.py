"""Compressed models as folders: the class's own config, ranks by layer, safetensors.

    config.json        of the model's class, as its library writes it
    compression.json   library, class, ratio, rank by layer
    model.safetensors  all weights

Stock `from_pretrained` cannot read such a folder (its layers have other shapes): `load_compressed`
does, into an object of the same class.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from snell_diffusion.compress.pela import low_rank_layers, replace
from snell_diffusion.errors import SnellaFileError, SnellaKeyError, SnellaValueError, quoted

__all__ = ["load_compressed", "save_compressed"]

FORMAT = 1
WEIGHTS, RANKS, CONFIG = "model.safetensors", "compression.json", "config.json"
_LIBRARIES = ("transformers", "diffusers")


def save_compressed(
    model: nn.Module,
    folder: str | os.PathLike[str],
    ratio: float,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a compressed model.

    Args:
        model: Of a class of transformers or diffusers, with compressed layers and no adapters.
        folder: New or empty.
        ratio: Recorded, not used.
        dtype: Of the weights written; None: as they are. The model itself is not changed.

    Returns:
        The folder.

    Raises:
        SnellaFileError: The folder holds something, or cannot be written.
        SnellaValueError: No layer is compressed, a tuner is on one, or the class is another
            library's.
    """
    target = Path(folder)
    library = type(model).__module__.partition(".")[0]
    ranks = {path: layer.rank for path, layer in low_rank_layers(model)}
    if not ranks:
        raise SnellaValueError("the model has no compressed layer to save: call compress first")
    for path, layer in low_rank_layers(model):
        if type(layer.first) is not nn.Linear or type(layer.second) is not nn.Linear:
            raise SnellaValueError(f"{path} has an adapter: merge or delete it before saving")
    if library not in _LIBRARIES:
        raise SnellaValueError(
            f"only classes of {' and '.join(_LIBRARIES)} can be saved, got "
            f"{type(model).__module__}.{type(model).__name__}"
        )
    require_empty(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        config = dict(model.config.to_dict() if library == "transformers" else model.config)
        config.pop("_name_or_path", None)
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        (target / CONFIG).write_text(text + "\n", "utf-8")
        about = {
            "format": FORMAT,
            "library": library,
            "class": type(model).__name__,
            "ratio": ratio,
            "ranks": ranks,
        }
        (target / RANKS).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        save_model(model if dtype is None else _copied(model, dtype), str(target / WEIGHTS))
    except OSError as error:
        raise SnellaFileError(f"{target} cannot be written: {error}") from error
    return target


def require_empty(folder: Path) -> None:
    """Refuse a folder that something would be written over.

    Raises:
        SnellaFileError: It holds something, or is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SnellaFileError(f"{folder} must be a new or empty folder, there is something already")


def load_compressed(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Read a folder of `save_compressed`, in eval mode, on the CPU. Runs no code from the folder.

    Raises:
        SnellaFileError: A file is missing, damaged, of a later format, or does not fit the others.
    """
    source = Path(folder)
    about, config = (_read(source / name) for name in (RANKS, CONFIG))
    if about.get("format") != FORMAT:
        raise SnellaFileError(
            f"{source / RANKS}: format {FORMAT} was expected, got {quoted(about.get('format'))}"
        )
    model = _build(source, about, config)
    ranks = about.get("ranks")
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise SnellaFileError(f"{source / RANKS}: ranks must be a table of whole numbers by layer")
    try:
        replace(model, ranks, empty=True)
        load_model(model, str(source / WEIGHTS))
    except (SnellaKeyError, SnellaValueError) as error:
        raise SnellaFileError(f"{source / RANKS} does not fit {CONFIG}: {error}") from error
    except (RuntimeError, SafetensorError, OSError) as error:
        raise SnellaFileError(f"{source / WEIGHTS} does not fit this model: {error}") from error
    return model.to(dtype).eval()


def _build(source: Path, about: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    """An object of the class that is named, from its config."""
    library, name = about.get("library"), about.get("class")
    if library not in _LIBRARIES or not isinstance(name, str):
        raise SnellaFileError(
            f"{source / RANKS}: library must be one of {', '.join(_LIBRARIES)} and class a name, "
            f"got {quoted(library)} and {quoted(name)}"
        )
    if library == "transformers":
        import transformers

        kind = getattr(transformers, name, None)
        base: type = transformers.PreTrainedModel
    else:
        import diffusers

        kind, base = getattr(diffusers, name, None), diffusers.ModelMixin
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise SnellaFileError(f"{source / RANKS}: {library} has no model class {quoted(name)}")
    try:
        if library == "transformers":
            return kind(kind.config_class.from_dict(config))
        return kind.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise SnellaFileError(f"{source / CONFIG} does not build {name}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise SnellaFileError(
            f"{path.parent} is no compressed model: it has no {path.name}"
        ) from error
    except (OSError, ValueError) as error:
        raise SnellaFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise SnellaFileError(f"{path} must hold a table, got {quoted(data)}")
    return data


def _copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype)
