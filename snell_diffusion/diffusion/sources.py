"""Where an adapter comes from: a file, a folder or a model hub; never outside of what was named."""

import os
import re
from pathlib import Path
from typing import Any

from snell_diffusion.adapters import WEIGHTS_NAME
from snell_diffusion.errors import SnellaFileError, SnellaValueError, shown
from snell_diffusion.versions import require

require("huggingface_hub")

__all__ = ["cache_label", "locate"]

_HUB_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,255}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(
    source: str | os.PathLike[str],
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> Path:
    """The file a source stands for; nothing is opened to find it.

    Args:
        source: A `.safetensors` file, a folder, or "owner/name" on the model hub.
        weight_name: File in the folder or repository; default `pytorch_snella_weights.safetensors`.
        subfolder: Folder below the folder or repository.
        hub: Any of revision, token, cache_dir, local_files_only and force_download, for
            `huggingface_hub.hf_hub_download`, which fetches this one file.

    Raises:
        SnellaFileError: Nothing there, no regular file, not reachable, or a link that leads out.
        SnellaValueError: A name that leads out of the folder, or no plain revision.
    """
    name = _plain_file(weight_name or WEIGHTS_NAME)
    folder = _plain_folder(subfolder)
    # os.path's tests, unlike pathlib's, take any text for an answer of no.
    if os.path.isdir(source):
        return _inside(Path(source), folder, name)
    if os.path.lexists(source):
        if weight_name or subfolder:
            raise SnellaValueError(
                f"{source} is a file: weight_name and subfolder are for folders and hub ids"
            )
        return _weights(Path(source))
    if _is_hub_id(str(source)):
        return _download(str(source), folder, name, hub)
    raise SnellaFileError(
        f"{source}: no such file or folder, and not a hub id of the form 'owner/name'; "
        "check the spelling and the working folder"
    )


def cache_label(path: Path) -> str:
    """How messages and reports call a file: its path, or for one of the hub's cache
    "owner/name@<commit>/<file>", so that the commit is on record."""
    for index in range(len(path.parts) - 3, 0, -1):
        repository, snapshots, commit = path.parts[index - 1 : index + 2]
        if snapshots == "snapshots" and repository.startswith("models--"):
            repository = repository.removeprefix("models--").replace("--", "/")
            return f"{repository}@{commit}/{'/'.join(path.parts[index + 2 :])}"
    return str(path)


def _plain_file(name: str) -> str:
    plain = name == os.path.basename(name) and not set(name) & {"\\", "\0"}
    if not plain or not name.endswith(".safetensors"):
        raise SnellaValueError(
            f"weight_name {name[:80]!r}: expected a plain file name ending in .safetensors "
            "(no pickles, no paths; folders go into subfolder)"
        )
    return name


def _plain_folder(subfolder: str | None) -> Path:
    folder = Path(subfolder or "")
    if folder.is_absolute() or ".." in folder.parts or set(str(folder)) & {"\\", "\0"}:
        raise SnellaValueError(
            f"subfolder {str(subfolder)[:80]!r}: expected a folder below the source, without '..'"
        )
    return folder


def _weights(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise SnellaFileError(
            f"{path}: expected a file ending in .safetensors, or a folder with one; no other kind "
            "of file is opened"
        )
    if not os.path.isfile(path):
        raise SnellaFileError(
            f"{path}: expected a regular file, found a folder, pipe, device or dangling link"
        )
    return path


def _inside(root: Path, folder: Path, name: str) -> Path:
    top = Path(os.path.realpath(root))
    place = Path(os.path.realpath(top / folder))
    _refuse_outside(place, [top], root / folder, root)
    # Listed, not asked for: on a file system without case, another spelling is another file.
    there = os.listdir(place) if place.is_dir() else []
    if name not in there:
        found = [item for item in there if item.endswith(".safetensors")]
        raise SnellaFileError(
            f"{root / folder / name}: no such file; safetensors files there: "
            f"{shown(found) or 'none'}. Name the file itself, or pass weight_name"
        )
    path = root / folder / name
    _refuse_outside(Path(os.path.realpath(path)), [top, *_blobs(top)], path, root)
    return _weights(path)


def _refuse_outside(target: Path, allowed: list[Path], path: Path, root: Path) -> None:
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise SnellaFileError(f"{path}: a link that leads out of {root}; copy the file there")


def _blobs(snapshot: Path) -> list[Path]:
    """Where the hub's cache keeps the files that a snapshot `models--*/snapshots/<commit>` links
    to; empty for any other folder."""
    repository = snapshot.parents[1] if len(snapshot.parents) > 1 else snapshot
    cached = (
        _COMMIT.fullmatch(snapshot.name)
        and snapshot.parent.name == "snapshots"
        and repository.name.startswith("models--")
    )
    return [repository / "blobs"] if cached else []


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    plain = ".." not in text and "--" not in text
    return plain and len(parts) == 2 and all(map(_HUB_PART.fullmatch, parts))


def _download(repo: str, folder: Path, name: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options = {key: value for key, value in hub.items() if value is not None}
    _check_revision(options.get("revision"))
    try:
        found = hf_hub_download(
            repo, name, subfolder=None if folder == Path() else folder.as_posix(), **options
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise SnellaFileError(
            f"{repo} on the hub: {folder / name} could not be fetched "
            f"({type(error).__name__}: {reason}); there is no such local "
            "path either. Check the name, weight_name, revision and the network"
        ) from error
    snapshot = Path(found).parents[len(folder.parts)]
    return _inside(snapshot, folder, name)


def _check_revision(revision: Any) -> None:
    # The hub's client makes a path below its cache from it.
    if revision is None:
        return
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise SnellaValueError(
            f"revision {str(revision)[:80]!r}: expected a branch, a tag or a commit "
            "(letters, digits, '.', '_', '-', '/')"
        )
