"""Fine-tuning methods as PEFT tuners; importing this package registers them with PEFT.

    from peft import get_peft_model
    from snell_diffusion import SnellaConfig

    model = get_peft_model(model, SnellaConfig.paper(target_modules=["to_q", "to_v"]))

A new method is one new file here: a `DeltaConfig`, a `DeltaLayer`, a `DeltaModel` and a `METHOD`.
"""

# ruff: noqa: E402  a library that is too old must be named before its import fails

from snell_diffusion.versions import require

require("torch", "peft", "accelerate")

from snell_diffusion.tuners.base import DeltaConfig, DeltaModel
from snell_diffusion.tuners.competition import Competition
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.optim import param_groups
from snell_diffusion.tuners.registry import METHODS, register_all
from snell_diffusion.tuners.snella import SnellaConfig, SnellaLayer, SnellaModel
from snell_diffusion.tuners.traverse import delta_buffers, delta_layers, delta_parameters

__all__ = [
    "METHODS",
    "Competition",
    "DeltaConfig",
    "DeltaLayer",
    "DeltaModel",
    "SnellaConfig",
    "SnellaLayer",
    "SnellaModel",
    "delta_buffers",
    "delta_layers",
    "delta_parameters",
    "param_groups",
]

register_all()
