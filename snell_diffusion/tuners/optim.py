"""Parameter groups for the optimizer: which tensors decay, and which learn at their own rate."""

from typing import Any

from torch import nn

from snell_diffusion.tuners.tokens import token_layers
from snell_diffusion.tuners.traverse import delta_parameters

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    adapter: str = "default",
    *,
    lr: float,
    weight_decay: float = 0.0,
    scalar_lr: float | None = None,
    token_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Every trainable tensor of a model in groups for a torch optimizer.

    - "factors": the adapter's matrices (A and B), at `lr` with `weight_decay`;
    - "scalars": its one-dimensional tensors (alpha, gamma, beta), at `scalar_lr`, never decayed:
      one step of size 1e-3 on beta alone moves a fresh update by more than its own norm, and decay
      would pull gamma towards zero;
    - "tokens": the rows of new words, at `token_lr`, never decayed;
    - "others": what else trains, such as `modules_to_save`, at `lr`; decayed if two-dimensional or
      more, in a group "others_undecayed" if not.

    Args:
        model: The adapted model.
        adapter: Which adapter's tensors go to the first two groups.
        lr: Learning rate, above 0.
        weight_decay: Decoupled decay, 0 or more.
        scalar_lr: Learning rate of the scalars; None is `lr`, as in the public code.
        token_lr: Learning rate of new words; None is `lr`.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`; empty ones are left out.

    Raises:
        ValueError: Nothing is trainable, or a rate is out of range.
    """
    _check_rates(lr=lr, weight_decay=weight_decay, scalar_lr=lr if scalar_lr is None else scalar_lr)
    mine = {id(p): p for p in delta_parameters(model, adapter).values() if p.requires_grad}
    tokens = [p for w in token_layers(model) for p in w.token_rows.values() if p.requires_grad]
    apart = {*mine, *map(id, tokens)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    factors = [p for p in mine.values() if p.ndim > 1]
    scalars = [p for p in mine.values() if p.ndim <= 1]
    decayed = [p for p in rest if p.ndim > 1]
    undecayed = [p for p in rest if p.ndim <= 1]
    groups = [
        {"name": "factors", "params": factors, "lr": lr, "weight_decay": weight_decay},
        {
            "name": "scalars",
            "params": scalars,
            "lr": lr if scalar_lr is None else scalar_lr,
            "weight_decay": 0.0,
        },
        {
            "name": "tokens",
            "params": tokens,
            "lr": lr if token_lr is None else token_lr,
            "weight_decay": 0.0,
        },
        {"name": "others", "params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"name": "others_undecayed", "params": undecayed, "lr": lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            f"adapter {adapter!r} has no trainable tensor in {type(model).__name__}: add it with "
            "inference_mode=False and make it active with set_adapter"
        )
    return groups


def _check_rates(**rates: float) -> None:
    for name, value in rates.items():
        if not 0.0 <= value < float("inf") or (name == "lr" and value == 0.0):
            raise ValueError(f"{name} must be a finite number, 0 or more (lr above 0), got {value}")
