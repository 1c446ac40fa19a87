"""Which layers compete in a run, by the settings of the adapter in its models."""

from peft import AdaLoraConfig

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.adapter_tensors import Components
from snell_diffusion.training.config_types import Precision
from snell_diffusion.tuners import Competition, SnellaConfig
from snell_diffusion.tuners.rank_budget import RankBudget


def build_competition(
    components: Components, adapter: str, steps: int, precision: Precision, misfit: str
) -> Competition | RankBudget | None:
    """The competition of an adapter's layers or ranks; None for methods without one.

    Args:
        components: Adapted models by name; the first one's settings are those of all.
        adapter: Which adapter competes.
        steps: Calls of `update` that the schedule of levels spans, at least 1.
        precision: What the models compute in.
        misfit: How the message begins where the schedule does not fit into `steps`.

    Raises:
        SnellaConfigError: Its schedule does not fit, or not this precision.
    """
    model = next(iter(components.values()))
    settings = getattr(model, "peft_config", {}).get(adapter)
    if isinstance(settings, AdaLoraConfig):
        if precision == "fp16":
            raise SnellaConfigError(
                "method adalora adds its own gradients, which mixed_precision fp16 would not "
                "scale: use bf16 or no"
            )
        return RankBudget(components, adapter)
    if not isinstance(settings, SnellaConfig) or settings.sparsify == "none":
        return None
    if not settings.competes:
        return None
    try:
        return Competition(components, adapter, settings, steps)
    except ValueError as error:
        raise SnellaConfigError(f"{misfit}: {error}") from error
