"""SNELLA for diffusion models: kernelized sparse updates that personalize a text-to-image model.

    import snell_diffusion                       # adds the verbs below to every DiffusionPipeline
    pipe.load_snella_weights("my-adapter/")      # save_, fuse_, set_snella_sparsity ...

Importing this package loads none of torch, diffusers, peft or gradio by itself; names are
imported when they are first asked for, and the pipeline verbs appear when diffusers is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from snell_diffusion.diffusion import install as _install

if TYPE_CHECKING:
    from snell_diffusion.adapters import inspect_adapter, load_adapter, read_adapter, save_adapter
    from snell_diffusion.diffusion.attention import SnellaAttnProcessor
    from snell_diffusion.errors import SnellaError
    from snell_diffusion.tuners import SnellaConfig

__version__ = "0.1.0"

_HOME = {
    "SnellaConfig": "snell_diffusion.tuners",
    "SnellaAttnProcessor": "snell_diffusion.diffusion.attention",
    "SnellaError": "snell_diffusion.errors",
    "inspect_adapter": "snell_diffusion.adapters",
    "load_adapter": "snell_diffusion.adapters",
    "read_adapter": "snell_diffusion.adapters",
    "save_adapter": "snell_diffusion.adapters",
}

__all__ = [
    "SnellaAttnProcessor",
    "SnellaConfig",
    "SnellaError",
    "__version__",
    "inspect_adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]

_install.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'snell_diffusion' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
