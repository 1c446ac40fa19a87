"""Default targets of methods whose papers name the layers they adapt."""

from typing import Any

from torch import nn

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.tuners.base import DeltaModel
from snell_diffusion.tuners.bypass import is_bypassed
from snell_diffusion.tuners.layer import DeltaLayer
from snell_diffusion.tuners.roles import endings, role_of
from snell_diffusion.tuners.weights import is_linear_like

__all__ = ["PlacedModel", "linears"]


class PlacedModel(DeltaModel):
    """Without `target_modules` all layers of the config's `default_roles` are adapted.

    Raises:
        SnellaConfigError: The model has no such layer by a usual name.
    """

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        roles = peft_config.default_roles
        if peft_config.target_modules is None and roles is not None:
            peft_config.target_modules = placed(peft_config.method, roles, model)
        super()._prepare_model(peft_config, model)


def placed(method: str, roles: tuple[str, ...], model: nn.Module) -> list[str]:
    """Those endings of some roles that Linear layers of the model have, as `target_modules`."""
    paths = linears(model)
    here = [path for path in paths if role_of(path) in roles]
    found = [e for e in endings(roles) if any(f".{path}".endswith(f".{e}") for path in here)]
    # An ending may be part of a longer one of another role: output.dense of attention.output.dense.
    strays = any(f".{p}".endswith(f".{e}") for e in found for p in {*paths} - {*here})
    if not found:
        raise SnellaConfigError(
            f"{method} adapts layers with the role {', '.join(roles)} and {type(model).__name__} "
            f"has no Linear layer by a usual name for it, only "
            f"{shown(paths, 4) or 'no Linear layer at all'}; set target_modules"
        )
    return here if strays else found


def linears(model: nn.Module) -> list[str]:
    """Paths of the Linear layers that can be adapted, quantized and adapted ones too."""
    return [
        path
        for path, module in model.named_modules()
        if (is_linear_like(module) or isinstance(module, DeltaLayer))
        and not path.endswith(".base_layer")
        and path
        and not is_bypassed(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
    ]
