"""Which images a step trains on, and the loss of them: functions of counters alone.

An epoch shows every image once, in an order of its own. Its last step has what is left. The images
of a step are dealt out to micro-batches and processes in turn, and every image weighs the same, so
the gradient does not depend on how many processes share a step.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_diffusion.training.parallel import Parallel
from snell_diffusion.training.randomness import generator
from snell_diffusion.vision.config import VisionConfig
from snell_diffusion.vision.data import Inputs
from snell_diffusion.vision.features import Features, HeadAlone
from snell_diffusion.vision.models import Family


@dataclass
class Order:
    """The order of the images.

    Attributes:
        size: Images, at least 1.
        batch: Images of a step, over all micro-batches and processes.
        seed: Of the run.
    """

    size: int
    batch: int
    seed: int
    _epoch: int = field(default=-1, init=False)
    _shuffled: list[int] = field(default_factory=list, init=False)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.size // self.batch)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, of a step, from 1."""
        return (step - 1) // self.per_epoch

    def images(self, step: int) -> list[int]:
        """Indices of the images of a step, from 1; never empty."""
        epoch, place = divmod(step - 1, self.per_epoch)
        if epoch != self._epoch:
            shuffled = torch.randperm(self.size, generator=generator(self.seed, "order", epoch))
            self._epoch, self._shuffled = epoch, shuffled.tolist()
        return self._shuffled[place * self.batch : (place + 1) * self.batch]


class ClassificationLoss:
    """Cross entropy of this process's images of a micro-batch: a `LossAt`.

    The mean over micro-batches and processes is the mean over the images of the step.

    Args:
        config: Label smoothing, seed and accumulation.
        family: How the model is asked.
        model: The classifier.
        inputs: Training images.
        order: Which of them when.
        parallel: The processes.
    """

    def __init__(
        self,
        config: VisionConfig,
        family: Family | HeadAlone,
        model: nn.Module,
        inputs: Inputs | Features,
        order: Order,
        parallel: Parallel,
    ) -> None:
        self._config, self._family, self._model = config, family, model
        self._inputs, self._order, self._parallel = inputs, order, parallel
        self._slots = config.gradient_accumulation_steps * parallel.world
        self._latest: list[int] = []

    def __call__(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = self._order.images(step)
        mine = images[micro * self._parallel.world + self._parallel.rank :: self._slots]
        self._latest = mine
        if not mine:  # the last step of an epoch may have fewer images than there are slots
            return self._nothing(), {"accuracy": torch.zeros((), device=self._parallel.device)}
        device, epoch = self._parallel.device, self._order.epoch_of(step)
        labels = self._inputs.labels(mine).to(device)
        pixels = self._inputs.pixels(mine, epoch, self._config.seed).to(device)
        scores = self._family.logits(self._model, pixels).float()
        loss = F.cross_entropy(
            scores, labels, reduction="sum", label_smoothing=self._config.label_smoothing
        )
        share = self._slots / len(images)
        right = (scores.detach().argmax(-1) == labels).sum()
        return loss * share, {"accuracy": right * share}

    def _nothing(self) -> Tensor:
        """A loss of 0 that gives every trained tensor a gradient of 0."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        return torch.stack([p.sum() for p in trained]).sum() * 0.0

    def culprits(self) -> list[str]:
        """The images of this process's latest micro-batch."""
        return [f"images {self._latest[:8]} of the training split"] if self._latest else []
