"""Default targets of methods whose papers name the layers they adapt."""

from typing import Any

from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.base import DeltaModel, default_targets
from snell_diffusion.tuners.roles import role_of

__all__ = ["PlacedModel"]


class PlacedModel(DeltaModel):
    """Without `target_modules` only layers of the config's `default_roles` are adapted.

    Raises:
        SnellaConfigError: The model has no such layer by a usual name.
    """

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        roles = peft_config.default_roles
        if peft_config.target_modules is None and roles is not None:
            usual = default_targets(model)
            peft_config.target_modules = [name for name in usual if role_of(name) in roles]
            if not peft_config.target_modules:
                raise SnellaConfigError(
                    f"{peft_config.method} adapts layers with the role {', '.join(roles)} and "
                    f"{type(model).__name__} has none by a usual name, only {', '.join(usual)}; "
                    "set target_modules"
                )
        super()._prepare_model(peft_config, model)
