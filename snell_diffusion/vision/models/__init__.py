"""Families of vision models. The folder is the registry: a file with a `FAMILY` is a family."""

import importlib
import pkgutil
from functools import cache

from snell_diffusion.errors import SnellaBaseError
from snell_diffusion.vision.models.base import HEAD, Family, image_size, new_head

__all__ = ["HEAD", "Family", "families", "family_for", "image_size", "new_head"]


@cache
def families() -> tuple[Family, ...]:
    """Every family of this folder."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base")
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def family_for(model_type: str, source: str) -> Family:
    """The family of a `model_type`; `source` names the base in the error.

    Raises:
        SnellaBaseError: No family covers it.
    """
    for family in families():
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in families() for kind in family.model_types)
    raise SnellaBaseError(
        f"base '{source}' is a model of type '{model_type}'; this trainer knows {known}"
    )
