"""The pixels that a run trains on, read when they are needed or ahead in worker processes.

Which photo stands where in a batch, and how it is cropped and mirrored, are functions of (seed,
step, micro-batch, place) alone. So it does not matter who reads a photo, nor when.
"""

import atexit
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo, square
from snell_diffusion.diffusion.decoding import PhotoError, read_photo
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.randomness import generator, item_at

CENTRE = (0.5, 0.5)


@dataclass(frozen=True)
class View:
    """How a photo is shown: `crop` as in `data.square`, and whether it is mirrored."""

    crop: tuple[float, float]
    flip: bool


@dataclass(frozen=True)
class Draws:
    """The stream of photos of one purpose, and the part of it that this process draws.

    Attributes:
        config: Seed, resolution, crops, flips, accumulation.
        name: Purpose, "instance" or "class".
        photos: What the stream is made of; every epoch holds each once.
        batch: Photos per micro-batch of this process.
        rank: This process.
        world: All processes.
    """

    config: TrainConfig
    name: str
    photos: Sequence[Photo]
    batch: int
    rank: int
    world: int

    def places(self) -> range:
        """Places of this process in the global batch."""
        return range(self.rank * self.batch, (self.rank + 1) * self.batch)

    def index(self, step: int, micro: int, place: int) -> int:
        """Which photo stands at a place of the global batch."""
        done = (step - 1) * self.config.gradient_accumulation_steps + micro
        position = done * self.batch * self.world + place
        return item_at(position, len(self.photos), self.config.seed, self.name)

    def view(self, step: int, micro: int, place: int) -> View:
        """How it is shown; a cached photo can only be mirrored."""
        seeded = generator(self.config.seed, f"{self.name}-view", step, micro, place)
        u = torch.rand(3, generator=seeded)
        crop = CENTRE if self.config.center_crop else (float(u[1]), float(u[2]))
        return View(crop, self.config.random_flip and bool(u[0] < 0.5))

    def read(self, step: int, micro: int) -> Tensor:
        """The pixels of this process's places, uint8 [batch, 3, S, S].

        Raises:
            SnellaConfigError: A photo is no longer what it was when the run began.
        """
        found = []
        for place in self.places():
            photo = self.photos[self.index(step, micro, place)]
            found.append(read_square(photo, self.config, self.view(step, micro, place)))
        return torch.stack(found)


def read_square(photo: Photo, config: TrainConfig, view: View) -> Tensor:
    """Decode a photo and cut its square, uint8 [3, S, S].

    Raises:
        SnellaConfigError: It is no longer what it was when the run began.
    """
    try:
        picture, digest = read_photo(photo.path)
        if digest != photo.digest:
            raise PhotoError("holds other bytes than before")
        return square(picture, config.resolution, view.crop, view.flip)
    except PhotoError as error:
        raise SnellaConfigError(
            f"photo '{photo.path}' {error}; it was fine when the run began: put it back"
        ) from error


class _MicroBatches(Dataset[list[Tensor] | SnellaConfigError]):
    """The pixels of every micro-batch by its position in the run: one tensor per stream."""

    def __init__(self, streams: Sequence[Draws], accumulation: int) -> None:
        self._streams, self._accumulation = streams, accumulation

    def __getitem__(self, position: int) -> list[Tensor] | SnellaConfigError:
        step, micro = divmod(position, self._accumulation)
        try:
            return [stream.read(step + 1, micro) for stream in self._streams]
        except SnellaConfigError as error:
            return error  # raised by the reader: a worker's own would come as a traceback in a text


class PixelReader:
    """The pixels of any micro-batch; those of the next ones are read ahead by workers.

    Args:
        streams: What a micro-batch consists of.
        config: Steps, accumulation and number of workers.
    """

    def __init__(self, streams: Sequence[Draws], config: TrainConfig) -> None:
        self._accumulation = config.gradient_accumulation_steps
        self._end = config.max_train_steps * self._accumulation
        self._workers = config.dataloader_num_workers
        self._data = _MicroBatches(streams, self._accumulation)
        self._ahead: Iterator[list[Tensor] | SnellaConfigError] | None = None
        self._next = -1

    def __call__(self, step: int, micro: int) -> list[Tensor]:
        """Pixels of each stream, uint8 [batch, 3, S, S].

        Raises:
            SnellaConfigError: A photo is no longer what it was when the run began.
        """
        position = (step - 1) * self._accumulation + micro
        if self._workers and self._ahead is None:
            self._start(position)
        if self._ahead is not None and position == self._next:
            found = next(self._ahead)
            self._next += 1
        else:  # no workers, or a batch that was read before
            found = self._data[position]
        if isinstance(found, SnellaConfigError):
            raise found
        return found

    def _start(self, position: int) -> None:
        loader = DataLoader(
            self._data,
            batch_size=None,
            sampler=range(position, self._end),
            num_workers=self._workers,
            worker_init_fn=_ignore_signals,
            # Of its own, for the global generator belongs to the model's dropout.
            generator=torch.Generator(),
        )
        self._ahead, self._next = iter(loader), position
        # Workers that ignore signals have to be told to end before Python waits for them.
        atexit.register(self.close)

    def close(self) -> None:
        """End the workers; pixels can still be read."""
        if self._ahead is not None:
            self._ahead, self._workers = None, 0
            atexit.unregister(self.close)


def _ignore_signals(worker: int) -> None:
    """Let the training process alone decide when a run stops, also where a group is signalled."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
