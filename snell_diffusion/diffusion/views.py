"""The pixels that a run trains on, read when they are needed or ahead in worker processes.

Which photo stands where in a batch, its shape, crop, mirroring and prompt are functions of (seed,
step, micro-batch, place) alone. So it does not matter who reads a photo, nor when.
"""

import atexit
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.framing import CENTRE, Size, View, nearest
from snell_diffusion.diffusion.pixels import read_mask_pixels, read_pixels
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.randomness import generator, item_at


@dataclass(frozen=True)
class Draws:
    """The stream of photos of one purpose, and the part of it that this process draws.

    Every epoch holds each photo as often as it repeats. Where photos have several shapes, a
    micro-batch has one: the epoch's next photo says which, and the stream of the photos of that
    shape fills the batch. So no batch is partial, and after as many micro-batches as the epoch has
    photos each of them was seen equally often.

    Attributes:
        config: Seed, crops, flips, accumulation.
        name: Purpose, "instance" or "class".
        photos: What the stream is made of.
        batch: Photos per micro-batch of this process.
        rank: This process.
        world: All processes.
        shapes: Shapes to train on, see `framing.shapes`; none = the square of config.resolution.
        caption_dropout: Share of samples that get the empty prompt, 0 to 1.
    """

    config: TrainConfig
    name: str
    photos: Sequence[Photo]
    batch: int
    rank: int
    world: int
    shapes: Sequence[Size] = ()
    caption_dropout: float = 0.0

    def shape_of(self, photo: Photo) -> Size:
        """Height and width in pixels that a photo is trained at."""
        square = (self.config.resolution, self.config.resolution)
        return nearest(photo.size, self.shapes) if self.shapes else square

    @cached_property
    def _epoch(self) -> list[int]:
        """The photos of an epoch, each as often as it repeats."""
        return [i for i, photo in enumerate(self.photos) for _ in range(photo.repeats)]

    @cached_property
    def _shapes(self) -> list[Size]:
        """Their shapes."""
        of_photo = [self.shape_of(photo) for photo in self.photos]
        return [of_photo[index] for index in self._epoch]

    @cached_property
    def _of_shape(self) -> dict[Size, list[int]]:
        """The photos of an epoch by their shape."""
        found: dict[Size, list[int]] = {}
        for index, shape in zip(self._epoch, self._shapes, strict=True):
            found.setdefault(shape, []).append(index)
        return found

    @cached_property
    def _latest(self) -> dict[int, tuple[Size, int]]:
        """What `_turn` found last: every sample of a micro-batch asks for it."""
        return {}

    def places(self) -> range:
        """Places of this process in the global batch."""
        return range(self.rank * self.batch, (self.rank + 1) * self.batch)

    def shape(self, step: int, micro: int) -> Size:
        """The shape of a whole global micro-batch."""
        return self._turn(step, micro)[0]

    def _turn(self, step: int, micro: int) -> tuple[Size, int]:
        """The shape of a micro-batch, and how many before it had the same."""
        done = (step - 1) * self.config.gradient_accumulation_steps + micro
        if len(self._of_shape) == 1:
            return next(iter(self._of_shape)), done
        if done not in self._latest:
            self._latest.clear()
            self._latest[done] = self._counted(done)
        return self._latest[done]

    def _counted(self, done: int) -> tuple[Size, int]:
        size, seed = len(self._epoch), self.config.seed
        epoch, offset = divmod(done, size)
        places = range(epoch * size, epoch * size + offset + 1)
        leaders = [self._shapes[item_at(p, size, seed, f"{self.name}-shape")] for p in places]
        shape = leaders.pop()
        return shape, epoch * len(self._of_shape[shape]) + leaders.count(shape)

    def index(self, step: int, micro: int, place: int) -> int:
        """Which photo stands at a place of the global batch."""
        shape, turn = self._turn(step, micro)
        several = len(self._of_shape) > 1
        purpose = f"{self.name}-{shape[0]}x{shape[1]}" if several else self.name
        position = turn * self.batch * self.world + place
        among = self._of_shape[shape]
        return among[item_at(position, len(among), self.config.seed, purpose)]

    def view(self, step: int, micro: int, place: int) -> View:
        """How it is shown; a cached photo can only be mirrored."""
        seeded = generator(self.config.seed, f"{self.name}-view", step, micro, place)
        u = torch.rand(3, generator=seeded)
        crop = CENTRE if self.config.center_crop else (float(u[1]), float(u[2]))
        return View(crop, self.config.random_flip and bool(u[0] < 0.5))

    def prompt(self, step: int, micro: int, place: int) -> str:
        """What its sample is told: its prompt, one of its templates, or nothing."""
        photo = self.photos[self.index(step, micro, place)]
        if not (self.caption_dropout or photo.templates):
            return photo.prompt
        seeded = generator(self.config.seed, f"{self.name}-prompt", step, micro, place)
        u = torch.rand(2, generator=seeded, dtype=torch.float64)
        if u[0] < self.caption_dropout:
            return ""
        choices = photo.templates or (photo.prompt,)
        return choices[int(u[1] * len(choices))]

    def prompts(self) -> list[str]:
        """Every prompt that a sample of this stream, or its prior, may get."""
        found = [p for photo in self.photos for p in (*photo.templates, photo.prompt)]
        if self.config.prior_loss == "prediction":
            found += [photo.prior_prompt for photo in self.photos]
        return [*found, ""] if self.caption_dropout else found

    @cached_property
    def masked(self) -> bool:
        """Whether any photo has a mask; then all are read with one."""
        return any(photo.mask is not None for photo in self.photos)

    def read(self, step: int, micro: int) -> Tensor:
        """The pixels of this process's places, uint8 [batch, 3, H, W]; a fourth channel is a mask.

        Raises:
            SnellaConfigError: A photo is no longer what it was when the run began.
        """
        shape, found = self.shape(step, micro), []
        for place in self.places():
            photo = self.photos[self.index(step, micro, place)]
            view = self.view(step, micro, place)
            pixels = read_pixels(photo, shape, view)
            if self.masked:
                pixels = torch.cat([pixels, read_mask_pixels(photo, shape, view)])
            found.append(pixels)
        return torch.stack(found)


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
        """Pixels of each stream, as `Draws.read` gives them.

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
