"""How well a classifier does on the images of one split."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_diffusion.training.adapter_tensors import evaluating
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.vision.data import Inputs
from snell_diffusion.vision.features import Features, HeadAlone
from snell_diffusion.vision.models import Family


@dataclass(frozen=True)
class Measurement:
    """Results on one split.

    Attributes:
        loss: Mean cross entropy, no label smoothing.
        predicted: Class of each image, int64 [N].
        labels: True class of each image, int64 [N].
    """

    loss: float
    predicted: Tensor
    labels: Tensor

    @property
    def right(self) -> int:
        """Images whose class was found."""
        return int((self.predicted == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Share of images whose class was found, 0 to 1."""
        return self.right / len(self.labels)

    @property
    def objective(self) -> float:
        """What is lower for the better of two: fewer errors, at equal errors the lower loss.

        (errors + loss / (1 + loss)) / N: the loss never outweighs one error.
        """
        if self.loss != self.loss:
            return float("nan")
        tie = 1.0 if self.loss == float("inf") else self.loss / (1 + self.loss)
        return (len(self.labels) - self.right + tie) / len(self.labels)

    def confusion(self, classes: int) -> Tensor:
        """Counts by true class (rows) and predicted class, int64 [classes, classes]."""
        places = self.labels * classes + self.predicted
        return torch.bincount(places, minlength=classes**2).view(classes, classes)

    def per_class(self, classes: int) -> list[float | None]:
        """Share found of each class; None for a class without an image."""
        counts = self.confusion(classes)
        return [
            None if not row.sum() else float(row[i]) / float(row.sum())
            for i, row in enumerate(counts)
        ]


def measure(
    family: Family | HeadAlone,
    model: nn.Module,
    inputs: Inputs | Features,
    batch: int,
    parallel: Parallel,
) -> Measurement:
    """Run a model over all images of a split, in eval mode.

    Processes take every `world`-th batch and share what they found.
    """
    size, device = len(inputs), parallel.device
    found = torch.zeros(size, dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    autocast: AbstractContextManager[None] = parallel.accelerator.autocast()
    with evaluating({"": model}), autocast:
        for start in range(parallel.rank * batch, size, batch * parallel.world):
            some = list(range(start, min(start + batch, size)))
            scores = family.logits(model, inputs.pixels(some).to(device)).float()
            found[start : start + len(some)] = scores.argmax(-1).double()
            labels = inputs.labels(some).to(device)
            total += F.cross_entropy(scores, labels, reduction="sum").double()
    found, total = parallel.mean(found) * parallel.world, parallel.mean(total) * parallel.world
    labels = inputs.labels(list(range(size)))
    return Measurement(float(total) / size, found.round().long().cpu(), labels)
