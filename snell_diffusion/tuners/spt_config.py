"""Settings that both SPT methods have, and what of a model they are about."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.base import (
    DeltaConfig,
    check_bool,
    check_int,
    check_number,
    config_field,
)
from snell_diffusion.tuners.placement import linears, placed
from snell_diffusion.tuners.roles import ROLES
from snell_diffusion.tuners.spt_selection import SptSelection, select

__all__ = ["KINDS", "TUNED", "SptConfig"]

KINDS = ("weight", "bias")
TUNED = ("entries", "bias_entries", "weight", "bias")
"""Names of what both methods tune, without prefix: single entries by kind, then whole vectors."""


@dataclass
class SptConfig(DeltaConfig):
    """Settings both SPT methods have.

    The paper's: r 8, alpha 10, beta 5, budgets of 0.05 to 1 million parameters, 16 batches of 32.

    Raises:
        SnellaConfigError: A value is out of range.
    """

    default_roles: ClassVar[tuple[str, ...] | None] = tuple(ROLES)
    not_saved: ClassVar[tuple[str, ...]] = ("selection",)

    r: int = config_field(DeltaConfig, "r", 8)
    selection: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "what is tuned, as the sensitivity pass found it; without one, and without a "
            "budget, every target layer gets its structured module and nothing else is tuned"
        },
    )
    budget: int | None = field(
        default=None,
        metadata={"help": "parameters to tune, 1 or more: the sensitivity pass chooses which"},
    )
    batches: int = field(
        default=16, metadata={"help": "batches of the sensitivity pass, 1 or more"}
    )
    alpha: float = field(
        default=10.0,
        metadata={
            "help": "a matrix gets its structured module when 1/alpha as many of its entries as "
            "the module has parameters are among the most sensitive, above 0"
        },
    )
    beta: float = field(
        default=5.0,
        metadata={"help": "a vector is tuned whole when 1/beta of its entries are, above 0"},
    )
    structured_only: bool = field(default=False, metadata={"help": "tune no single entries"})
    structured_vectors: bool = field(
        default=True, metadata={"help": "whether vectors (biases, norms) may be tuned whole"}
    )
    tune_norms: bool = field(default=True, metadata={"help": "whether norms may be tuned"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            check_int("budget", self.budget, at_least=1)
        check_int("batches", self.batches, at_least=1)
        for name in ("alpha", "beta"):
            check_number(name, getattr(self, name), "above 0", lambda value: value > 0)
        for name in ("structured_only", "structured_vectors", "tune_norms"):
            check_bool(name, getattr(self, name))
        if self.selection is not None:
            self.selection = SptSelection.from_dict(self.selection).to_dict()

    @property
    def chosen(self) -> SptSelection | None:
        """The selection; None where every target is tuned by a structured module."""
        return None if self.selection is None else SptSelection.from_dict(self.selection)

    @property
    def wants_selection(self) -> bool:
        """Whether a sensitivity pass has to come before the model is adapted."""
        return self.budget is not None and self.selection is None

    def selected(
        self,
        model: nn.Module,
        losses: Iterable[Tensor],
        *,
        extra: int = 0,
        public_sweep: bool = False,
    ) -> Self:
        """This config with what the sensitivity pass chooses for its budget; see `select`.

        Raises:
            SnellaConfigError: It has no budget, or no layer of the model is a target.
            SnellaValueError: The pass failed, or nothing comes close to the budget.
        """
        if self.budget is None:
            raise SnellaConfigError(
                f"budget of {self.method} must be set for a sensitivity pass: the number of "
                "parameters to tune"
            )
        found = select(
            *(model, losses, self, self.budget),
            targets=target_paths(model, self),
            extra=extra,
            public_sweep=public_sweep,
        )
        return replace(self, selection=found.to_dict())

    @classmethod
    def stored(
        cls, settings: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> Self:
        """With the selection that the tensors of a file are of; their positions come with them."""
        prefix = f"{cls.method.lower()}_"
        structured: list[str] = []
        vectors: list[str] = []
        entries: dict[str, int] = {}
        for path, held in shapes.items():
            own = {name.removeprefix(prefix): shape for name, shape in held.items()}
            if "down" in own:
                structured.append(path)
            vectors += [f"{path}.{kind}" for kind in KINDS if kind in own]
            entries |= {
                f"{path}.{kind}": own[name][0]
                for kind, name in zip(KINDS, TUNED[:2], strict=True)
                if name in own
            }
        found = SptSelection(tuple(structured), tuple(vectors), entries)
        return cls(
            **settings,
            selection=found.to_dict(),
            target_modules=list(shapes),
            inference_mode=True,
        )

    @abstractmethod
    def module_size(self, path: str, outputs: int, inputs: int) -> int:
        """Parameters of the structured module of a layer [O, I]."""


def target_paths(model: nn.Module, config: SptConfig) -> list[str]:
    """Paths of the Linear layers that the config's targets are in a model.

    Raises:
        SnellaConfigError: There is none.
    """
    paths = linears(model)
    wanted = config
    if config.target_modules is None:
        roles = config.default_roles or ()
        wanted = replace(config, target_modules=placed(config.method, roles, model))
    elif config.target_modules == "all-linear":
        return paths
    found = [path for path in paths if check_target_module_exists(wanted, path)]
    if not found:
        raise SnellaConfigError(
            f"no Linear layer of {type(model).__name__} is among target_modules "
            f"{config.target_modules!r}"
        )
    return found
