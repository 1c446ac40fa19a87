"""Where an adapter comes from: a file, a folder or a model hub; never outside of what was named."""

import os
from pathlib import Path
from typing import Any

from snell_diffusion.adapters import WEIGHTS_NAME
from snell_diffusion.errors import SnellaFileError, SnellaValueError, shown
from snell_diffusion.versions import require

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def locate(
    source: str | os.PathLike[str],
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> Path:
    """The file a source stands for.

    Args:
        source: A file, a folder, or "owner/name" on the model hub.
        weight_name: File in the folder or repository; default `pytorch_snella_weights.safetensors`.
        subfolder: Folder below the folder or repository.
        hub: Any of `HUB_OPTIONS`, for `huggingface_hub.hf_hub_download`.

    Raises:
        SnellaFileError: Nothing there, or not reachable.
        SnellaValueError: A name that leads out of the folder.
    """
    name = _plain_file(weight_name or WEIGHTS_NAME)
    folder = _plain_folder(subfolder)
    path = Path(source)
    if path.is_dir():
        return _inside(path, folder / name)
    if path.exists():
        if weight_name or subfolder:
            raise SnellaValueError(
                f"{path} is a file: weight_name and subfolder are for folders and hub ids"
            )
        return path
    if _is_hub_id(str(source)):
        return _download(str(source), name, folder, hub)
    raise SnellaFileError(
        f"{path}: no such file or folder, and not a hub id of the form 'owner/name'; "
        "check the spelling and the working folder"
    )


def _plain_file(name: str) -> str:
    if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
        raise SnellaValueError(
            f"weight_name {name[:80]!r}: expected a plain file name ending in .safetensors "
            "(no pickles, no paths; folders go into subfolder)"
        )
    return name


def _plain_folder(subfolder: str | None) -> Path:
    folder = Path(subfolder or "")
    if folder.is_absolute() or ".." in folder.parts or "\\" in str(folder):
        raise SnellaValueError(
            f"subfolder {str(subfolder)[:80]!r}: expected a folder below the source, without '..'"
        )
    return folder


def _inside(root: Path, relative: Path) -> Path:
    path = root / relative
    if not path.exists():
        there = [item.name for item in path.parent.glob("*.safetensors")]
        raise SnellaFileError(
            f"{path}: no such file; safetensors files there: {shown(there) or 'none'}. "
            "Pass weight_name for another name"
        )
    # The hub's cache keeps files in a sibling folder and links to them.
    resolved = root.resolve()
    allowed = resolved.parents[1] if resolved.parent.name == "snapshots" else resolved
    if not path.resolve().is_relative_to(allowed):
        raise SnellaFileError(f"{path}: a link that leads out of {root}; copy the file there")
    return path


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(
        part and part[0] != "." and all(c.isalnum() or c in "._-" for c in part) for part in parts
    )


def _download(repo: str, name: str, folder: Path, hub: dict[str, Any]) -> Path:
    require("huggingface_hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options = {key: value for key, value in hub.items() if value is not None}
    try:
        found = hf_hub_download(
            repo, name, subfolder=None if folder == Path() else folder.as_posix(), **options
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SnellaFileError(
            f"{repo} on the hub: {folder / name} could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); there is no such local "
            "path either. Check the name, weight_name, revision and the network"
        ) from error
    return Path(found)
