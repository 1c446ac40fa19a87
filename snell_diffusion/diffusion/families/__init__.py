"""Model families. The folder is the registry: a file here with a `FAMILY` record is a family."""

import importlib
import json
import pkgutil
from functools import cache
from pathlib import Path

from snell_diffusion.diffusion.families.base import Conditions, Family, SampleRequest
from snell_diffusion.errors import SnellaBaseError

__all__ = ["Conditions", "Family", "SampleRequest", "covering", "families", "family_of"]


@cache
def families() -> dict[str, Family]:
    """Every family in this folder by its name."""
    modules = (
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.name != "base"
    )
    return {module.FAMILY.name: module.FAMILY for module in modules}


def family_of(source: str, revision: str | None = None) -> Family:
    """Find the family of a base model by the pipeline class in its model_index.json.

    Raises:
        SnellaBaseError: There is no such file, or no family covers the class it names.
    """
    return covering(_pipeline_class(source, revision), source)


def covering(pipeline: str, source: str) -> Family:
    """The family of a pipeline class; `source` names the base in the error.

    Raises:
        SnellaBaseError: No family covers the class.
    """
    for family in families().values():
        if pipeline in family.pipelines:
            return family
    known = ", ".join(sorted(p for f in families().values() for p in f.pipelines))
    raise SnellaBaseError(f"base '{source}' is a {pipeline}; this trainer knows {known}")


def _pipeline_class(source: str, revision: str | None) -> str:
    path = Path(source) / "model_index.json"
    if not Path(source).is_dir():
        path = _download_index(source, revision)
    try:
        return str(json.loads(path.read_text("utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise SnellaBaseError(
            f"base '{source}' is not a diffusers model folder: no readable model_index.json"
        ) from error


def _download_index(source: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, "model_index.json", revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise SnellaBaseError(
            f"base '{source}' is neither a folder here nor a model on the hub that can be reached; "
            f"give a diffusers folder, a hub id, or 'embedded'"
        ) from error
