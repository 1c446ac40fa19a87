"""Features of a frozen base, computed once: what a linear probe trains on.

Only the head changes, so an image that looks the same in every epoch has the same features in every
epoch. The classes here stand in for `Inputs` and `Family`, with features in place of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snell_diffusion.training.adapter_tensors import evaluating
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.vision.data import Inputs
from snell_diffusion.vision.models import HEAD, Family


@dataclass(frozen=True)
class HeadAlone:
    """A family whose pictures are features."""

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Class scores [B, classes] of features [B, D]."""
        scores: Tensor = getattr(model, HEAD)(pixels)
        return scores


class Features:
    """What reaches the head, of every picture of a split; computed at the first look.

    Args:
        family: How the model is asked.
        model: A classifier whose base is frozen and draws nothing at random.
        inputs: Pictures that never vary.
        batch: How many at once.
        parallel: Device and precision.
    """

    def __init__(
        self, family: Family, model: nn.Module, inputs: Inputs, batch: int, parallel: Parallel
    ) -> None:
        self._family, self._model, self._inputs = family, model, inputs
        self._batch, self._parallel = batch, parallel
        self._known: Tensor | None = None

    def __len__(self) -> int:
        return len(self._inputs)

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Class numbers, int64 [B]."""
        return self._inputs.labels(indices)

    def pixels(self, indices: Sequence[int], epoch: int = 0, seed: int = 0) -> Tensor:
        """Features, float32 [B, D]."""
        if self._known is None:
            self._known = self._compute()
        return self._known[torch.tensor(indices, dtype=torch.int64, device=self._known.device)]

    @torch.no_grad()
    def _compute(self) -> Tensor:
        found: list[Tensor] = []

        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0].float())

        handle = getattr(self._model, HEAD).register_forward_pre_hook(take)
        try:
            with evaluating({"": self._model}), self._parallel.accelerator.autocast():
                for start in range(0, len(self._inputs), self._batch):
                    some = range(start, min(start + self._batch, len(self._inputs)))
                    pixels = self._inputs.pixels(list(some)).to(self._parallel.device)
                    self._family.logits(self._model, pixels)
        finally:
            handle.remove()
        return torch.cat(found)


def is_constant(model: nn.Module, inputs: Inputs, drop_path: float) -> bool:
    """Whether features of pictures are the same every time: only the head trains, nothing drops.

    Args:
        model: The classifier, ready to train.
        inputs: Training pictures.
        drop_path: Stochastic depth of the base.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    head_only = all(name.startswith(f"{HEAD}.") for name in trained)
    settings = model.config.to_dict().items()  # type: ignore[union-attr,operator]
    drops = any("dropout" in name and isinstance(v, float) and v > 0 for name, v in settings)
    return head_only and not drops and not drop_path and not inputs.varies
