"""Pictures of a split as model inputs: read when asked for, or once where they never change."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from snell_diffusion.training.randomness import generator
from snell_diffusion.vision.data.preprocess import Preprocess
from snell_diffusion.vision.data.settings import Data
from snell_diffusion.vision.data.splits import Split

_LARGEST_CACHE = 2**30  # bytes


class Inputs:
    """Normalised pictures of one split.

    How a training picture is cropped and mirrored is a function of (seed, epoch, index) alone, so
    it does not matter which process reads it, nor what was read before.

    Args:
        split: The pictures.
        preprocess: How they are shown.
        train: Whether they are trained on, that is cropped and mirrored at random.
        config: Cache and threads.

    Attributes:
        varies: Whether epoch and seed make a difference.
    """

    def __init__(self, split: Split, preprocess: Preprocess, train: bool, config: Data) -> None:
        self._split, self._preprocess = split, preprocess
        self.varies = train and preprocess.varies
        size = len(split) * 3 * preprocess.size**2
        self._known: list[Tensor | None] | None = None
        if config.cache_images and not self.varies and size <= _LARGEST_CACHE:
            self._known = [None] * len(split)
        self._threads = ThreadPoolExecutor(config.num_workers) if config.num_workers else None

    def __len__(self) -> int:
        return len(self._split)

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Class numbers, int64 [B]."""
        return self._split.labels[torch.tensor(indices, dtype=torch.int64)]

    def pixels(self, indices: Sequence[int], epoch: int = 0, seed: int = 0) -> Tensor:
        """Pictures as the model reads them.

        Args:
            indices: Which, 0 to len - 1, B of them.
            epoch: Epoch that they are shown in, from 0.
            seed: Seed of the run.

        Returns:
            Tensor [B, 3, size, size], float32.

        Raises:
            SnellaConfigError: A file is gone or damaged; it is named.
        """
        if self._threads is None:
            rows = [self._row(index, epoch, seed) for index in indices]
        else:
            rows = list(self._threads.map(lambda index: self._row(index, epoch, seed), indices))
        return self._preprocess.normalize(torch.stack(rows))

    def _row(self, index: int, epoch: int, seed: int) -> Tensor:
        if self._known is not None:
            known = self._known[index]
            if known is not None:
                return known
        view = generator(seed, "view", epoch, index) if self.varies else None
        row = self._preprocess.pixels(self._split.image(index), view)
        if self._known is not None:
            self._known[index] = row
        return row
