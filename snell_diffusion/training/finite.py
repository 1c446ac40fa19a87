"""Nothing that is NaN or infinite reaches an update or a file, and all processes stop together.

A value counts as finite while its square is: a float32 weight of 1e20 is a run that exploded, too.
Every check that may raise is agreed on first, because a process that raises alone leaves the others
waiting in their next exchange.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object
from torch import Tensor

from snell_diffusion.errors import shown
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.training.parallel.base import Parallel

_SHOWN = 4
_ADVICE = "Lower learning_rate, or use mixed_precision no or bf16"


@runtime_checkable
class NamesCulprits(Protocol):
    """A loss that can tell which of its samples were not finite."""

    def culprits(self) -> list[str]:
        """Texts such as "photo 'cat.png'" about the latest step of this process."""


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, 0-d, on their device: finite only if every square is."""
    return torch.nn.utils.get_total_norm(tensors)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose norm is not finite, in order; waits for the device once."""
    if not tensors:
        return []
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()))])
    sound = norms.isfinite().tolist()
    return [name for name, ok in zip(tensors, sound, strict=True) if not ok]


def found_anywhere(found: Sequence[str], parallel: Parallel) -> list[str]:
    """What any process found, the same list on all of them; each must call this.

    Returns:
        Every text once; a process is named where not all of them found the same.
    """
    if parallel.world == 1:
        return list(found)
    flag = torch.tensor(float(bool(found)), device=parallel.device)
    if not float(parallel.mean(flag)):
        return []
    ranks: dict[str, list[int]] = {}
    for rank, text in gather_object([(parallel.rank, text) for text in found]):
        ranks.setdefault(text, []).append(rank)
    return [
        text if len(who) == parallel.world else f"{text} (process {', '.join(map(str, who))})"
        for text, who in ranks.items()
    ]


def require_sound(problems: Sequence[str], what: str, advice: str, parallel: Parallel) -> None:
    """Stop every process if one of them has problems.

    Args:
        problems: Texts of this process, for example "photo 'cat.png'".
        what: What is wrong with them, for example "latents with NaN or infinite values".
        advice: What the user should do, a sentence without full stop.
        parallel: The processes.

    Raises:
        NonFiniteError: Names all problems of all processes.
    """
    found = found_anywhere(problems, parallel)
    if found:
        raise NonFiniteError(f"{what}: {shown(found)}. {advice}")


def require_finite_weights(weights: Mapping[str, Tensor], when: str, parallel: Parallel) -> None:
    """Refuse weights that are not finite on any process, before they reach a file.

    Raises:
        NonFiniteError: Names the first of them and `when` they were found.
    """
    bad = found_anywhere(not_finite(weights), parallel)
    if bad:
        raise NonFiniteError(
            f"{when} weights are NaN, infinite or too large to square, in {shown(bad, _SHOWN)}; "
            f"nothing was saved. {_ADVICE}"
        )


def refuse_weights(
    weights: Mapping[str, Tensor], step: int, rate: float, parallel: Parallel
) -> NoReturn:
    """End the run: the update before `step` made weights not finite (on every process alike)."""
    bad = found_anywhere(not_finite(weights), parallel)
    raise NonFiniteError(
        f"weights are NaN, infinite or too large to square before step {step}, learning rate "
        f"{rate:.1e}, in {shown(bad, _SHOWN)}; the step was not taken. {_ADVICE}"
    )


def refuse_loss(
    totals: Mapping[str, Tensor],
    value: float,
    loss: object,
    step: int,
    rate: float,
    parallel: Parallel,
) -> NoReturn:
    """End the run: the mean loss over the processes is not finite.

    Args:
        totals: Loss and its parts on this process.
        value: The mean loss.
        loss: What computed it; asked for its culprits if it is a `NamesCulprits`.
        step: The step that is not taken.
        rate: Its learning rate.
        parallel: The processes.
    """
    # The parts say more than their sum.
    parts = {name: total for name, total in totals.items() if name != "loss"} or totals
    found = [name for name, total in parts.items() if not bool(total.isfinite())]
    if isinstance(loss, NamesCulprits):
        found += loss.culprits()
    raise NonFiniteError(
        f"the loss is {value} at step {step}, learning rate {rate:.1e}, in "
        f"{'; '.join(found_anywhere(found, parallel)) or 'its sum'}; the step was not taken. "
        f"{_ADVICE}"
    )


def refuse_gradients(
    gradients: Mapping[str, Tensor],
    numbers: Mapping[str, float],
    step: int,
    rate: float,
    overflows: int,
    parallel: Parallel,
) -> NoReturn:
    """End the run: the averaged gradients are not finite.

    Args:
        gradients: By parameter, before clipping.
        numbers: Mean loss and gradient norm, `loss` and `grad_norm`.
        step: The step that is not taken.
        rate: Its learning rate.
        overflows: Steps in a row that were skipped before this one, under a gradient scaler.
        parallel: The processes.
    """
    bad = found_anywhere(not_finite(gradients), parallel)
    skipped = f" (after {overflows} skipped steps in a row)" if overflows else ""
    raise NonFiniteError(
        f"the gradient norm is {numbers['grad_norm']} at step {step}{skipped}, loss "
        f"{numbers['loss']:.4g}, learning rate {rate:.1e}, in {shown(bad, _SHOWN)}; the step was "
        f"not taken. {_ADVICE}"
    )
