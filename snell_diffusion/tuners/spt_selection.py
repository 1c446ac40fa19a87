"""What a run of SPT tunes: found by a sensitivity pass, carried by the config, built from it.

    selection = select(model, losses, config, budget=1_000_000)
    config = dataclasses.replace(config, selection=selection.to_dict())

The scores and the choice are in `snell_diffusion.core.sensitivity`. Tuned may be the weights and
biases of the target layers and weight and bias of every norm of the model; token and position
embeddings, patch embedding and head are none of these, as in the public code.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snell_diffusion.core.sensitivity import MILLION, Choice, accumulate, choose
from snell_diffusion.errors import SnellaConfigError, SnellaValueError, quoted, shown
from snell_diffusion.tuners.weights import has_plain_weight

if TYPE_CHECKING:
    from snell_diffusion.tuners.spt_config import SptConfig

__all__ = ["SptSelection", "is_norm", "select"]

PARTS = {"structured": list, "vectors": list, "entries": dict}
WIDEST = 4
"""Choices between which the best is looked for mark up to this many times the budget."""
FINEST = 400


@dataclass(frozen=True)
class SptSelection:
    """What is tuned.

    Attributes:
        structured: Paths of the layers with a structured module.
        vectors: Paths of the parameters that are tuned as a whole, e.g. `blocks.0.norm1.bias`.
        entries: Flat positions of single entries by parameter path; or only how many, where the
            positions come with the adapter's tensors.
    """

    structured: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    entries: Mapping[str, Sequence[int] | int] | None = None

    @classmethod
    def from_dict(cls, table: Any) -> "SptSelection":
        """Read `to_dict`'s form.

        Raises:
            SnellaConfigError: It is no such table; says what is wrong.
        """
        if not isinstance(table, Mapping) or set(table) - set(PARTS):
            raise SnellaConfigError(
                f"selection must be a table with {', '.join(PARTS)}, got {quoted(table)}"
            )
        names = [
            *table.get("structured", ()),
            *table.get("vectors", ()),
            *table.get("entries", {}),
        ]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise SnellaConfigError(
                "selection must name at least one layer or parameter, all by paths, got "
                f"{quoted(table)}"
            )
        entries = dict(table.get("entries", {}))
        strange = [n for n in names[len(table.get("structured", ())) :] if not _is_parameter(n)]
        if strange:
            raise SnellaConfigError(
                f"selection's vectors and entries must be of weights and biases, by paths that end "
                f"in .weight or .bias, got {shown(strange)}"
            )
        for path, positions in entries.items():
            _check_positions(path, positions)
        structured, vectors = (tuple(table.get(name, ())) for name in ("structured", "vectors"))
        return cls(structured, vectors, entries)

    @classmethod
    def of_choice(cls, choice: Choice) -> "SptSelection":
        """From a budget's choice among parameters by path."""
        return cls(
            tuple(path.removesuffix(".weight") for path in choice.matrices),
            choice.vectors,
            {path: found.tolist() for path, found in choice.entries.items() if len(found)},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, as a config and its JSON hold them."""
        entries = self.entries or {}
        return {
            "structured": list(self.structured),
            "vectors": list(self.vectors),
            "entries": {k: v if isinstance(v, int) else list(v) for k, v in entries.items()},
        }

    def modules(self) -> list[str]:
        """Paths of all modules something of which is tuned, each once."""
        parameters = (*self.vectors, *(self.entries or {}))
        owners = (path.rpartition(".")[0] for path in parameters)
        return list(dict.fromkeys([*self.structured, *owners]))

    def count(self, parameter: str) -> int:
        """How many single entries of a parameter are tuned."""
        found = (self.entries or {}).get(parameter, 0)
        return found if isinstance(found, int) else len(found)

    def positions(self, parameter: str) -> Tensor:
        """Flat positions of a parameter's single entries, int64; 0, 1, ... where only their number
        is known."""
        found = (self.entries or {}).get(parameter, 0)
        return torch.arange(found) if isinstance(found, int) else torch.tensor(found).long()


def select(
    model: nn.Module,
    losses: Iterable[Tensor],
    config: "SptConfig",
    budget: int,
    *,
    targets: Sequence[str],
    extra: int = 0,
    public_sweep: bool = False,
) -> SptSelection:
    """The sensitivity pass and the choice for one budget.

    Args:
        model: The base model, without adapters of its own that train. It stays in the mode it is
            in; the public code has it in training mode.
        losses: One scalar a batch, computed while this iterates over them: a generator. 16 batches
            of 32 in the public code.
        config: Its rank, alpha, beta, structured_only, structured_vectors and tune_norms.
        budget: Parameters to tune.
        targets: Paths of the layers that may get a structured module.
        extra: Parameters that are tuned anyway and count too (a class token).
        public_sweep: Mark 20,000, 40,000, ... entries, as the public code does, in place of steps
            that suit the budget.

    Raises:
        SnellaValueError: A gradient is missing or not finite, or nothing comes close to the budget.
    """
    structured, parameters = _candidates(model, config, targets)
    unit = MILLION if public_sweep else 1.0
    try:
        with _differentiable(model, parameters):
            scores = accumulate(_gradients(losses, parameters))
        scores = {n: scores.get(n, torch.zeros_like(p)) for n, p in parameters.items()}
        total = sum(parameter.numel() for parameter in parameters.values())
        (found,) = choose(
            scores,
            structured,
            [budget / unit],
            unit=unit,
            extra=extra,
            alpha=config.alpha,
            beta=config.beta,
            structured_only=config.structured_only,
            structured_vectors=config.structured_vectors,
            taus=None if public_sweep else marks(budget, total),
        ).values() or (None,)
    except ValueError as error:
        raise SnellaValueError(f"the sensitivity pass failed: {error}") from error
    if found is None or not (found.structured or found.single):
        raise SnellaValueError(
            f"no choice comes close to a budget of {budget:,} parameters: the smallest structured "
            f"module has {min(structured.values(), default=0):,}; ask for more, or lower r"
        )
    return SptSelection.of_choice(found)


def marks(budget: int, total: int) -> list[int]:
    """How many entries to mark in turn: up to `FINEST` steps to `WIDEST` times the budget."""
    most = max(1, min(total, WIDEST * budget))
    steps = min(most, FINEST)
    return sorted({-(-most * step // steps) for step in range(1, steps + 1)})


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with parameters of its own: by its name, one weight by feature."""
    weight = getattr(module, "weight", None)
    return (
        "Norm" in type(module).__name__
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not any(True for _ in module.children())
    )


def _candidates(
    model: nn.Module, config: "SptConfig", targets: Sequence[str]
) -> tuple[dict[str, int], dict[str, nn.Parameter]]:
    """Size of each matrix's structured module, and everything that may be tuned, by path."""
    wanted, structured, parameters = set(targets), {}, {}
    for path, module in model.named_modules():
        norm = config.tune_norms and is_norm(module)
        if path not in wanted and not norm:
            continue
        if not norm and not has_plain_weight(module):
            raise SnellaValueError(
                f"sensitivities are gradients of the weights themselves, and {path} is a "
                f"{type(module).__name__} without a plain weight of floats: load the base model "
                "unquantized, or leave the layer out of target_modules"
            )
        for name, parameter in module.named_parameters(recurse=False):
            parameters[f"{path}.{name}"] = parameter
        if not norm:
            structured[f"{path}.weight"] = config.module_size(path, *module.weight.shape)
    missing = wanted - {path.removesuffix(".weight") for path in structured}
    if missing:
        raise SnellaConfigError(f"the model has no layer {shown(missing)}")
    return structured, parameters


@contextmanager
def _differentiable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; as before afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in parameters.values()}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, state in before:
            parameter.requires_grad_(state)


def _gradients(
    losses: Iterable[Tensor], parameters: Mapping[str, nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    for loss in losses:
        if not loss.requires_grad:
            raise ValueError(
                "a loss does not depend on what may be tuned: compute each one while the pass asks "
                "for it (a generator), with gradients enabled"
            )
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        yield {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def _is_parameter(path: str) -> bool:
    return path.endswith((".weight", ".bias"))


def _check_positions(path: str, positions: Any) -> None:
    whole = [positions] if isinstance(positions, int) else positions
    good = isinstance(whole, list) and all(type(p) is int and p >= 0 for p in whole)
    if not good or len(set(whole)) < len(whole):
        raise SnellaConfigError(
            f"selection's entries of {path} must be different whole numbers, 0 or more, or how "
            f"many they are; got {quoted(positions)}"
        )
