"""The one worker that owns the pipeline: requests take turns, and each of them can be ended."""

import gc
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from snell_diffusion.app.bases import Base, Bases
from snell_diffusion.app.drawing import DrawRequest, Result, Step
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaError, SnellaValueError

if TYPE_CHECKING:
    from snell_diffusion.app.pipelines import Garment, Loaded, Look
    from snell_diffusion.app.workspace import Workspace

HEARTBEAT = 0.5  # seconds after which a caller hears of a request, whether anything happened or not
REMEMBERED = 32  # pictures that need not be drawn again


class Cancelled(Exception):
    """The one who asked is no longer interested."""


@dataclass(frozen=True)
class Plan:
    """A checked request with all that was looked up for it."""

    request: DrawRequest
    base: Base
    worn: tuple[tuple["Garment", float], ...]
    looks: tuple["Look", ...]

    @property
    def total(self) -> int:
        """Denoising steps of all its pictures."""
        twice = 2 if self.request.compare_with_base else 1
        return len(self.looks) * twice * self.request.steps


@dataclass
class Work:
    """Requests that the worker does in one turn, and how far it is.

    Attributes:
        plans: What to draw.
        news: Results, then None or the error that ended it.
        cancelled: Set by the one who asked.
    """

    plans: Sequence[Plan]
    news: queue.SimpleQueue[Result | BaseException | None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    phase: Any = "waiting"
    done: int = 0
    started: float = 0.0
    drawing_since: float | None = None

    @property
    def total(self) -> int:
        return sum(plan.total for plan in self.plans)

    def step(self) -> Step:
        """Where it is now; the time left goes by the steps since the first one."""
        left = None
        if self.drawing_since is not None and self.done:
            spent = time.monotonic() - self.drawing_since
            left = spent / self.done * (self.total - self.done)
        return Step(self.phase, self.done, self.total, left)


class Studio:
    """Draws for all users, one request at a time, with at most one base in memory.

    The same request gives the same picture bit for bit, whatever was drawn before it.

    Args:
        bases: What may be drawn with.
        limits: Bounds of a request and of the time it may take.
        remembered: Finished pictures to keep, so that a new sparsity draws only what it changes.
    """

    def __init__(self, bases: Bases, limits: Limits = LIMITS, remembered: int = REMEMBERED) -> None:
        self.bases = bases
        self.limits = limits
        self._loaded: Loaded | None = None
        self._remembered = remembered
        self._pictures: OrderedDict[Any, Image.Image] = OrderedDict()
        self._waiting: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._running: Work | None = None
        self._worker: threading.Thread | None = None
        self._start = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether the worker has the pipeline in its hands."""
        return self._running is not None

    def draw(self, request: DrawRequest, workspace: "Workspace") -> Iterator[Step | Result]:
        """Draw one request: steps at least every HEARTBEAT seconds, at last the result.

        Closing the iterator ends the work, wherever it is.

        Raises:
            SnellaError: A value out of range, no such base or adapter, an adapter of another base,
                or more time or memory needed than there is.
        """
        return self.draw_all([request], workspace)

    def draw_all(
        self, requests: Sequence[DrawRequest], workspace: "Workspace"
    ) -> Iterator[Step | Result]:
        """Draw several requests in one turn: a result for each, in their order; see `draw`."""
        plans = [self.plan(request, workspace) for request in requests]
        return self._followed(plans)

    def plan(self, request: DrawRequest, workspace: "Workspace") -> Plan:
        """A request with its base and adapters looked up.

        Raises:
            SnellaValueError: A value out of range, no such base or adapter, or one of another base.
        """
        from snell_diffusion.app.pipelines import Garment, Look

        request.check(self.limits)
        base = self.bases.get(request.base)
        request.check_base(base)
        worn = []
        for name, strength in request.adapters:
            adapter = workspace.library.get(name)
            if adapter.base_id is None or not self._alike(adapter.base_id, base):
                raise SnellaValueError(_misfit(adapter.label, adapter.base_id, base))
            worn.append((Garment.of(adapter), strength))
        fields = request.model_dump(include=set(Look.__dataclass_fields__) - {"seed"})
        looks = tuple(Look(**fields, seed=seed) for seed in request.seeds(self.limits))
        return Plan(request, base, tuple(worn), looks)

    def _alike(self, trained_on: str, base: Base) -> bool:
        """Whether a base is the one an adapter was trained on, or is built the same."""
        if trained_on == base.id:
            return True
        known = self.bases.get(trained_on)
        parts = ("unet", "transformer")
        return known.family == base.family and all(
            known.identity(part) == base.identity(part) for part in parts
        )

    # The side of those who ask

    def _followed(self, plans: Sequence[Plan]) -> Iterator[Step | Result]:
        work = Work(plans, queue.SimpleQueue())
        self._employ()
        self._waiting.put(work)
        try:
            while True:
                try:
                    news = work.news.get(timeout=HEARTBEAT)
                except queue.Empty:
                    yield work.step()
                    continue
                if news is None:
                    return
                if isinstance(news, BaseException):
                    raise news
                yield news
        finally:
            work.cancelled.set()  # and no waiting: iterators may be closed by a server's event loop

    def _employ(self) -> None:
        """Start the worker with the first request; it ends with the process."""
        with self._start:
            if self._worker is None:
                self._worker = threading.Thread(target=self._serve, name="pipeline", daemon=True)
                self._worker.start()

    # The side of the worker

    def _serve(self) -> None:
        while True:
            work = self._waiting.get()
            if not work.cancelled.is_set():
                self._running = work
                try:
                    self._do(work)
                finally:
                    self._running = None

    def _do(self, work: Work) -> None:
        work.started = time.monotonic()
        try:
            for plan in work.plans:
                work.news.put(self._drawn(plan, work))
            work.news.put(None)
        except Cancelled:
            work.news.put(None)
        except Exception as error:  # raised again where the request came from
            work.news.put(self._explained(error))

    def _drawn(self, plan: Plan, work: Work) -> Result:
        begun = time.monotonic()
        watch = self._watch(work)
        watch()
        loaded = self._open(plan.base, work)
        looks = plan.looks if plan.request.compare_with_base else ()
        bare = [self._picture(loaded, plan, look, (), watch, work) for look in looks]
        work.phase = "loading" if work.drawing_since is None else "drawing"
        loaded.wear(plan.worn, plan.request.sparsity, watch)
        kept, size = loaded.kept(plan.request.sparsity)
        worn = [self._picture(loaded, plan, look, plan.worn, watch, work) for look in plan.looks]
        seeds = tuple(look.seed for look in plan.looks)
        seconds = time.monotonic() - begun
        return Result(tuple(worn), tuple(bare), seeds, kept, size, seconds)

    def _picture(
        self, loaded: "Loaded", plan: Plan, look: "Look", worn: Any, watch: Any, work: Work
    ) -> Image.Image:
        key = (plan.base.id, look, worn, plan.request.sparsity if worn else None)
        work.phase = "drawing"
        work.drawing_since = work.drawing_since or time.monotonic()
        first = work.done
        if key not in self._pictures:
            if not worn:
                loaded.take_off()
            self._pictures[key] = loaded.picture(look, _counting(work, watch))
        self._pictures.move_to_end(key)
        picture = self._pictures[key].copy()
        while len(self._pictures) > self._remembered:
            self._pictures.popitem(last=False)
        work.done = first + plan.request.steps
        return picture

    def _open(self, base: Base, work: Work) -> "Loaded":
        from snell_diffusion.app.pipelines import Loaded

        if self._loaded is None or self._loaded.base != base:
            work.phase = "loading"
            self._drop()
            self._loaded = Loaded(base)
        return self._loaded

    def _drop(self) -> None:
        """Free the memory of the base."""
        self._loaded = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _watch(self, work: Work) -> Callable[[], None]:
        def watch() -> None:
            if work.cancelled.is_set():
                raise Cancelled
            if time.monotonic() - work.started > self.limits.draw_seconds:
                raise SnellaValueError(
                    f"this took longer than {self.limits.draw_seconds:g} seconds and was ended: "
                    "ask for fewer pictures, fewer steps or a smaller size"
                )

        return watch

    def _explained(self, error: Exception) -> Exception:
        """Out of memory as a sentence; after any surprise the pipeline is loaded anew."""
        if not isinstance(error, SnellaError):
            self._drop()
        if _is_out_of_memory(error):
            return SnellaValueError(
                "there is not enough memory for this picture: ask for a smaller size or a "
                "smaller base model"
            )
        return error


def _counting(work: Work, watch: Callable[[], None]) -> Callable[[], None]:
    def watched() -> None:
        work.done += 1
        watch()

    return watched


def _misfit(label: str, trained_on: str | None, base: Base) -> str:
    if trained_on is None:
        return f"{label} was trained on a base model that this server does not have: choose another"
    return f"{label} was trained on the base {trained_on}, not {base.id}: choose that base"


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in text
    )
