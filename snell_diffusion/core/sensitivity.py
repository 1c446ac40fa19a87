"""What to tune by the size of its gradients: sensitivity-aware tuning (SPT, arXiv:2303.08566).

    Sens = sum over batches of (batch gradient)^2                       by single parameter

For growing tau the tau most sensitive entries of all tensors together are marked. A tensor with
enough marks is tuned as a whole, a matrix by a structured module (LoRA, adapter) and a vector by
itself; of the others the marked entries are tuned one by one. What fits a budget best is kept.

Gradients are those of batches, as in the public code, so scores depend on the batch size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import full

STEPS = 79
STEP = 0.02
"""tau runs from 0.02 to 1.58 units."""
MILLION = 1e6


@dataclass(frozen=True)
class Choice:
    """What one budget tunes.

    Attributes:
        budget: In units, as it was asked for.
        marks: tau, the number of entries that were marked.
        structured: Parameters of structured modules and whole vectors.
        single: Single entries.
        extra: Parameters that are tuned whatever the budget, counted in it.
        matrices: Names of the matrices with a structured module, in the given order.
        vectors: Names of the vectors tuned as a whole.
        entries: Flat positions of single entries, int64 ascending, by name; every tensor that is
            not tuned as a whole has an item, also where nothing of it is tuned.
    """

    budget: float
    marks: int
    structured: int
    single: int
    extra: int
    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    entries: Mapping[str, Tensor]

    @property
    def total(self) -> int:
        """Parameters that are tuned, all together."""
        return self.structured + self.single + self.extra


def accumulate(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sensitivities by name, float32 (float64 for float64), in the first batch's order.

    Args:
        batches: Gradients by parameter name, one mapping a batch; a name may be missing.

    Raises:
        ValueError: There is no batch, or a gradient is not finite.
    """
    total: dict[str, Tensor] = {}
    for batch in batches:
        for name, gradient in batch.items():
            square = full(gradient.detach()).square()
            if not bool(torch.isfinite(square).all()):
                raise ValueError(
                    f"the gradient of {name} is not finite, or its square is not: sensitivities "
                    "would say nothing; compute the loss in float32"
                )
            total[name] = square if name not in total else total[name].add_(square)
    if not total:
        raise ValueError("sensitivities need the gradients of at least one batch, got none")
    return total


def lora_size(r: int, outputs: int, inputs: int) -> int:
    """Parameters of a LoRA of rank r at a matrix [O, I]."""
    return r * (inputs + outputs)


def adapter_size(r: int, outputs: int, inputs: int) -> int:
    """Parameters of an adapter I -> r -> O with biases; behind a linear I is its O."""
    return r * (inputs + outputs) + r + outputs


def choose(
    sensitivity: Mapping[str, Tensor],
    structured: Mapping[str, int],
    budgets: Sequence[float],
    *,
    unit: float = MILLION,
    extra: int = 0,
    alpha: float = 10.0,
    beta: float = 5.0,
    structured_only: bool = False,
    structured_vectors: bool = True,
    taus: Sequence[int] | None = None,
) -> dict[float, Choice]:
    """What to tune, by budget; those are left out that no choice comes close to.

    Close is a total of at most twice the budget. Between equally close totals the one with more
    marks wins, as in the public code.

    Args:
        sensitivity: Scores by name, of every tensor that may be tuned.
        structured: Size of the structured module of each matrix that may get one, by name.
        budgets: Numbers of parameters, in units.
        unit: Parameters a unit; the public code counts in millions.
        extra: Parameters tuned in any case, such as a class token, that count too.
        alpha: A matrix gets its module with size / alpha marks or more.
        beta: A vector is tuned as a whole with length / beta marks or more.
        structured_only: Tune no single entries.
        structured_vectors: Whether vectors may be tuned as a whole.
        taus: Numbers of entries to mark, ascending; None for the public code's, 0.02 to 1.58 units.

    Raises:
        ValueError: A number is out of range, or a matrix has no score.
    """
    _check(sensitivity, structured, budgets, unit, extra, alpha, beta)
    sizes = [
        _whole_size(name, score, structured, structured_vectors)
        for name, score in sensitivity.items()
    ]
    ratios = [alpha if name in structured else beta for name in sensitivity]
    enough = [
        math.inf if size is None else size / ratio
        for size, ratio in zip(sizes, ratios, strict=True)
    ]
    taus = taus or [math.ceil(round(k * STEP * unit, 6)) for k in range(1, STEPS + 1)]
    tensors, positions = ranked(list(sensitivity.values()), taus[-1])

    best: dict[float, tuple[float, int]] = {}
    for tau in taus:
        counts = torch.bincount(tensors[:tau], minlength=len(sizes)).tolist()
        total = extra
        for size, needed, count in zip(sizes, enough, counts, strict=True):
            whole = size is not None and count >= needed
            total += (size or 0) if whole else (0 if structured_only else count)
        for budget in budgets:
            distance = abs(total - budget * unit)
            if distance <= best.get(budget, (budget * unit, 0))[0]:
                best[budget] = (distance, tau)
    names = list(sensitivity)
    return {
        budget: _choice(
            *(budget, best[budget][1], names, sizes, enough, set(structured)),
            *(tensors, positions, extra, structured_only),
        )
        for budget in budgets
        if budget in best
    }


def ranked(scores: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """The `most` largest entries of some tensors together, largest first.

    Of equal ones the first tensor's come first, and there those of lower position. Memory is that
    of the largest tensor and a few times `most`.

    Returns:
        Which tensor each is in and its flat position there, both int64, on the CPU.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    held = 0
    for number, score in enumerate(scores):
        values, positions = _largest(full(score).flatten(), most)
        found.append((values, torch.full_like(positions, number), positions))
        held += len(values)
        if held > 2 * most:
            found = [_sorted(found, most)]
            held = most
    _, tensors, positions = _sorted(found, most)
    return tensors, positions


def scatter(values: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of zeros with some entries set, differentiable in the values.

    Its backward pass reads the gradient at the positions: memory linear in the matrix, where the
    public code's is quadratic in the number of entries.

    Args:
        values: [n].
        positions: Flat, [n] int64, each once.
        shape: Of the result.
    """
    zeros = values.new_zeros(math.prod(shape))
    return zeros.scatter(0, positions, values).reshape(tuple(shape))


def _check(
    sensitivity: Mapping[str, Tensor],
    structured: Mapping[str, int],
    budgets: Sequence[float],
    unit: float,
    extra: int,
    alpha: float,
    beta: float,
) -> None:
    numbers = {"unit": unit, "alpha": alpha, "beta": beta}
    numbers |= {f"budget {budget}": budget for budget in budgets}
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    if extra < 0:
        raise ValueError(f"extra must be a number of parameters, 0 or more, got {extra}")
    unscored = sorted(set(structured) - set(sensitivity))
    if unscored:
        raise ValueError(f"matrices without a sensitivity: {', '.join(unscored[:8])}")


def _whole_size(
    name: str, score: Tensor, structured: Mapping[str, int], vectors: bool
) -> int | None:
    """What tuning a tensor as a whole costs; None where only single entries are possible."""
    if name in structured:
        return structured[name]
    return score.numel() if score.dim() == 1 and vectors else None


def _choice(
    budget: float,
    tau: int,
    names: Sequence[str],
    sizes: Sequence[int | None],
    enough: Sequence[float],
    with_module: set[str],
    tensors: Tensor,
    positions: Tensor,
    extra: int,
    structured_only: bool,
) -> Choice:
    tensors, positions = tensors[:tau], positions[:tau]
    counts = torch.bincount(tensors, minlength=len(names)).tolist()
    whole = [count >= needed for count, needed in zip(counts, enough, strict=True)]
    chosen = [name for name, all_of_it in zip(names, whole, strict=True) if all_of_it]
    none = positions[:0]
    entries = {
        name: none if structured_only else positions[tensors == number].sort().values
        for number, name in enumerate(names)
        if not whole[number]
    }
    return Choice(
        budget=budget,
        marks=tau,
        structured=sum(
            size or 0 for size, all_of_it in zip(sizes, whole, strict=True) if all_of_it
        ),
        single=sum(map(len, entries.values())),
        extra=extra,
        matrices=tuple(name for name in chosen if name in with_module),
        vectors=tuple(name for name in chosen if name not in with_module),
        entries=entries,
    )


def _largest(flat: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest entries and their positions, ascending; of equal ones the first."""
    if flat.numel() <= most:
        return flat.cpu(), torch.arange(flat.numel())
    limit = flat.topk(most, sorted=False).values.min()
    above = (flat > limit).nonzero().flatten()
    equal = (flat == limit).nonzero().flatten()[: most - len(above)]
    positions = torch.cat([above, equal]).sort().values
    return flat[positions].cpu(), positions.cpu()


def _sorted(
    found: Sequence[tuple[Tensor, Tensor, Tensor]], most: int
) -> tuple[Tensor, Tensor, Tensor]:
    values, tensors, positions = map(torch.cat, zip(*found, strict=True))
    order = values.argsort(descending=True, stable=True)[:most]
    return values[order], tensors[order], positions[order]
