"""Makes our methods known to PEFT: the only file that touches PEFT's private mappings.

`peft.utils.register_peft_method` accepts names of PEFT's own enum only, so a method enters by hand
the three dictionaries that PEFT looks it up in. The folder is the list of methods: every module of
this package that holds a `METHOD` is one.
"""

import pkgutil
from dataclasses import dataclass
from importlib import import_module, metadata
from types import MappingProxyType
from typing import Any

import peft.mapping
from packaging.version import Version

from snell_diffusion.versions import require

__all__ = ["METHODS", "Method", "MethodName", "find_methods", "register"]

TESTED_BELOW = "0.23"
MAPPINGS = {
    "config": "PEFT_TYPE_TO_CONFIG_MAPPING",
    "model": "PEFT_TYPE_TO_TUNER_MAPPING",
    "prefix": "PEFT_TYPE_TO_PREFIX_MAPPING",
}


class MethodName(str):
    """A method's name in upper case, with the two attributes callers expect of PEFT's enum."""

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Method:
    """One fine-tuning method: what a file of this folder offers as `METHOD`.

    Args:
        name: Upper case; the `peft_type` in saved configs.
        config: A `DeltaConfig` class.
        model: A `DeltaModel` class; its `prefix` must be the name in lower case and an underscore,
            or those of the method that this one is a setting of (SNELL is one of SNELLA).
        summary: What it does, in one line of a list of methods.
    """

    name: str
    config: Any
    model: Any
    summary: str = ""

    @property
    def prefix(self) -> str:
        """What its tensors' names begin with."""
        return str(self.model.prefix)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What tensors may be called: own name first, then those of the config's ancestors."""
        kinds = self.config.__mro__ if getattr(self.config, "method", None) == self.name else ()
        names = (self.name, *(getattr(kind, "method", self.name) for kind in kinds))
        return tuple(f"{name.lower()}_" for name in dict.fromkeys(names))

    @property
    def stored_as(self) -> str:
        """The method that adapter files name, in lower case: the one whose tensors these are."""
        return self.prefix.removesuffix("_")


def register(method: Method) -> None:
    """Enter a method into PEFT's mappings; doing so again with the same classes changes nothing.

    Raises:
        ImportError: This version of PEFT is not supported.
        ValueError: The name is not upper case, is taken, or does not fit the model's prefix.
    """
    mappings = _peft_mappings()
    if not method.name.isupper():
        raise ValueError(f"a method's name must be upper case, got {method.name!r}")
    if getattr(method.model, "prefix", None) not in method.prefixes:
        raise ValueError(
            f"method {method.name} needs a model class with prefix {method.prefixes[0]!r}, "
            f"{method.model.__name__} has {getattr(method.model, 'prefix', None)!r}"
        )
    taken = mappings["config"].get(method.name)
    if taken is not None and taken is not method.config:
        raise ValueError(f"PEFT already has a method {method.name}: {taken.__qualname__}")
    name = MethodName(method.name)
    for kind, mapping in mappings.items():
        mapping[name] = getattr(method, kind)


def find_methods() -> dict[str, Method]:
    """The methods of this folder by name, found by their files."""
    package = import_module(__package__)
    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    found = (getattr(import_module(f"{__package__}.{name}"), "METHOD", None) for name in modules)
    return {method.name: method for method in found if method is not None}


def _peft_mappings() -> dict[str, dict]:
    require("peft")
    installed = metadata.version("peft")
    missing = [name for name in MAPPINGS.values() if not hasattr(peft.mapping, name)]
    if missing or Version(installed) >= Version(TESTED_BELOW):
        raise ImportError(
            f"snell_diffusion registers its methods in PEFT's mappings and was tested with "
            f"peft>=0.21,<{TESTED_BELOW}, but peft {installed} is installed"
            + (f" (no {', '.join(missing)} in peft.mapping)" if missing else "")
            + f": pip install 'peft>=0.21,<{TESTED_BELOW}'"
        )
    return {kind: getattr(peft.mapping, name) for kind, name in MAPPINGS.items()}


_FOUND: dict[str, Method] = {}
METHODS = MappingProxyType(_FOUND)
"""Registered methods by name, filled when `snell_diffusion.tuners` is imported."""


def register_all() -> None:
    """Find and register the methods of this folder; called once by the package."""
    for method in find_methods().values():
        register(method)
        _FOUND[method.name] = method
