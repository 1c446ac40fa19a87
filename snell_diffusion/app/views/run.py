"""One run, live: progress, curves, samples, allocation, and what can be done with it."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd

from snell_diffusion.app.allocation import AllocationPictures, allocation_version
from snell_diffusion.app.job_record import JobStatus
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.progress import KINDS, curves, sentence, share
from snell_diffusion.app.shared import HIDDEN, POLL, QUIET, Shared, said
from snell_diffusion.app.views.files import cached
from snell_diffusion.errors import SnellaError

NO_RUN = "No run yet."
HINT = (
    "Pause saves the run, to go on later. Stop saves it too and keeps what it learned so far as an "
    "adapter to draw with."
)
CAPTION = (
    "Training: mean over the last steps. Held-out: photos that are never trained on. Base model: "
    "the same photos before training."
)
COLOURS = dict(zip(KINDS, ("#4f46e5", "#c2410c", "#9a9a9a"), strict=True))
WAITS = 3  # ticks of a page that shows no run before it stops asking
Seen = dict[str, Any]
Part = tuple[Any, Callable[[], Any]]  # what it depends on, and how it is made: only if that changed
MoreParts = Callable[[Jobs, str | None, JobStatus | None], dict[str, Part]]


@dataclass(frozen=True)
class RunView:
    """The components of a view; what follows a run's end may listen to them.

    Attributes:
        bar: Progress and a sentence.
        curves: Training and held-out loss over the steps.
        samples: Sample sheets, oldest first.
        allocation: What each layer keeps.
        pause, stop, resume, draw: Buttons, enabled while they do something.
        timer: Ticks while the run that is shown is going.
        more: What the caller shows besides.
        seen: What this page shows already, by part.
        look: Brings the parts up to date: (run, seen, request) -> updates of `parts`.
    """

    bar: gr.HTML
    curves: gr.LinePlot
    samples: gr.Gallery
    allocation: gr.Image
    pause: gr.Button
    stop: gr.Button
    resume: gr.Button
    draw: gr.Button
    timer: gr.Timer
    more: Sequence[Any]
    seen: gr.State
    look: Callable[..., tuple[Any, ...]]

    @property
    def parts(self) -> list[Any]:
        """The outputs of `look`, in its order."""
        shown = [self.bar, self.curves, self.samples, self.allocation]
        buttons = [self.pause, self.stop, self.resume, self.draw]
        return [*shown, *buttons, self.timer, *self.more, self.seen]


def run_view(
    shared: Shared,
    run: Any,
    prefix: str = "run",
    more: Sequence[Any] = (),
    more_parts: MoreParts | None = None,
) -> RunView:
    """Build the view of the run whose id `run` holds, and keep it up to date.

    A `gr.State` that is set by an event outside the queue tells nobody that it changed; the view
    sees it within a few seconds.

    Args:
        shared: The page.
        run: Component with a run's id or None.
        prefix: Begins the ids of the elements; one view of a page each.
        more: Components of the caller that depend on the run.
        more_parts: Their parts in the same order, from the runs, the id and the status.
    """
    view = _components(shared, prefix, more, more_parts)
    look = said(view.look)
    for event in (run.change, view.timer.tick):
        event(look, [run, view.seen], view.parts, **QUIET)
    actions = ((view.pause, Jobs.pause), (view.stop, Jobs.stop), (view.resume, Jobs.resume))
    for button, action in actions:
        clicked = button.click(_acted(shared, action), [run], None, **QUIET)
        clicked.then(look, [run, view.seen], view.parts, **QUIET)
    view.draw.click(_wanted(shared), [run], [shared.wanted, shared.tabs], **HIDDEN)
    return view


def _components(
    shared: Shared, prefix: str, more: Sequence[Any], more_parts: MoreParts | None
) -> RunView:
    bar = gr.HTML(text(NO_RUN), elem_id=f"{prefix}-bar")
    buttons = _buttons(prefix)
    gr.Markdown(HINT)
    gr.Markdown("**Sample pictures as training goes on, the base model first**")
    samples = gr.Gallery(
        label="Sample pictures",
        show_label=False,  # it would cover the first one
        elem_id=f"{prefix}-samples",
        elem_classes="run-samples",
        columns=2,
        fit_columns=False,
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
    )
    with gr.Row():
        with gr.Column(min_width=300):
            plot = gr.LinePlot(
                _frame([]),
                x="step",
                y="loss",
                color="kind",
                color_map=COLOURS,
                title="Loss over the steps (lower is better)",
                x_title="step",
                y_title="loss",
                color_title=" ",
                height=340,
                visible=False,
                elem_id=f"{prefix}-curves",
            )
            gr.Markdown(CAPTION)
        with gr.Column(min_width=300):
            allocation = gr.Image(
                label="Where the weights go",
                show_label=False,  # it would cover the picture's own title
                elem_id=f"{prefix}-allocation",
                interactive=False,
                format="png",
                buttons=["download", "fullscreen"],
            )
    look = _look(shared, AllocationPictures(), more_parts or (lambda jobs, run, status: {}))
    timer, seen = gr.Timer(POLL), gr.State({})
    return RunView(bar, plot, samples, allocation, *buttons, timer, more, seen, look)


def _buttons(prefix: str) -> list[gr.Button]:
    kinds = (
        ("pause", "Pause", "secondary"),
        ("stop", "Stop", "stop"),
        ("resume", "Resume", "secondary"),
        ("draw", "Draw with it", "primary"),
    )
    with gr.Row():
        return [
            gr.Button(
                label,
                variant=variant,
                interactive=False,
                min_width=120,
                elem_id=f"{prefix}-{name}",
            )
            for name, label, variant in kinds
        ]


def _look(
    shared: Shared, pictures: AllocationPictures, more_parts: MoreParts
) -> Callable[..., tuple[Any, ...]]:
    def look(run: str | None, seen: Seen | None, request: gr.Request) -> tuple[Any, ...]:
        jobs, before = shared.workspace(request).jobs, seen or {}
        run, status, problem = _status(jobs, run)
        waited = 0 if run else before.get("waited", 0) + 1
        parts = {
            **_parts(jobs, run, status, problem, pictures),
            "timer": _timer(status, waited),
            **more_parts(jobs, run, status),
        }
        updates = [
            gr.skip() if name in before and before[name] == version else make()
            for name, (version, make) in parts.items()
        ]
        versions = {name: version for name, (version, _) in parts.items()}
        return *updates, {**versions, "waited": waited}

    return look


def _status(jobs: Jobs, run: str | None) -> tuple[str | None, JobStatus | None, str]:
    """Id and status of a run; none and why for one that was deleted meanwhile."""
    try:
        return (run, jobs.status(run), "") if run else (None, None, NO_RUN)
    except SnellaError as error:
        return None, None, str(error)


def _timer(status: JobStatus | None, waited: int) -> Part:
    """It ticks while a run is going, and a few times before the page knows of one."""
    active = status.running if status is not None else waited < WAITS
    return active, lambda: gr.update(active=active)


def _parts(
    jobs: Jobs,
    run: str | None,
    status: JobStatus | None,
    problem: str,
    pictures: AllocationPictures,
) -> dict[str, Part]:
    """What is shown of a run, in the order of the view's components."""
    events = jobs.events(run) if run else []
    sheets = jobs.samples(run) if run else []
    able = _able(jobs, run, status)
    bar = text(problem) if status is None else bar_html(status)
    again = "Start again" if able["again"] else "Resume"
    drawn = allocation_version(events)
    return {
        "bar": (bar, lambda: bar),
        "curves": ((run, len(events)), lambda: _plotted(curves(events))),
        "samples": ((run, [step for step, _ in sheets]), lambda: gallery(sheets)),
        "allocation": ((run, *drawn), lambda: pictures.get(run or "", events)),
        "pause": (able["pause"], lambda: gr.update(interactive=able["pause"])),
        "stop": (able["stop"], lambda: gr.update(interactive=able["stop"])),
        "resume": (
            (able["resume"], again),
            lambda: gr.update(interactive=able["resume"], value=again),
        ),
        "draw": (able["draw"], lambda: gr.update(interactive=able["draw"])),
    }


def _able(jobs: Jobs, run: str | None, status: JobStatus | None) -> dict[str, bool]:
    """What the buttons would do something for."""
    if run is None or status is None:
        return dict.fromkeys(("pause", "stop", "resume", "again", "draw"), False)
    asked = status.state in ("pausing", "stopping", "finishing")
    going = status.running and not asked
    ended = not status.running and status.state != "finished"
    return {
        "pause": going,
        "stop": going or (status.state == "paused" and status.resumable),
        "resume": ended,
        "again": ended and not status.resumable,
        "draw": jobs.has_adapter(run),
    }


def _acted(shared: Shared, action: Callable[[Jobs, str], None]) -> Callable[..., None]:
    def act(run: str | None, request: gr.Request) -> None:
        action(shared.workspace(request).jobs, run or "")

    return said(act)


def _wanted(shared: Shared) -> Callable[..., tuple[str, Any]]:
    def wanted(run: str | None, request: gr.Request) -> tuple[str, Any]:
        shared.workspace(request).jobs.adapter(run or "")
        return run or "", gr.update(selected="generate")

    return said(wanted)


def _plotted(points: Sequence[tuple[int, float, str]]) -> Any:
    # A plot that was drawn while it was empty never shows a line of a kind that comes later.
    return gr.update(value=_frame(points), visible=bool(points))


def _frame(points: Sequence[tuple[int, float, str]]) -> pd.DataFrame:
    # numbers from the first, empty frame on: the plot's axes keep the type they start with
    frame = pd.DataFrame(points, columns=["step", "loss", "kind"])
    return frame.astype({"step": float, "loss": float, "kind": str})


def gallery(sheets: Sequence[tuple[int, Any]]) -> list[tuple[str, str]]:
    """Sheets with their steps as captions, as files that the page may show."""
    return [(cached(path), f"step {step}") for step, path in sheets]


def bar_html(status: JobStatus) -> str:
    """A progress bar with its sentence; the sentence is escaped, as it may quote a log."""
    words = html.escape(sentence(status))
    # While it counts steps, a screen reader should not read every one of them.
    live = "off" if status.state == "training" else "polite"
    value = "" if status.running and not status.step else f'value="{share(status):.4f}"'
    return (
        f'<progress {value} max="1" style="width:100%;accent-color:var(--primary-500)" '
        f'aria-label="Progress of the run"></progress>'
        f'<p aria-live="{live}" data-state="{html.escape(status.state)}">{words}</p>'
    )


def text(words: str) -> str:
    """A sentence where the bar would be."""
    return f'<p aria-live="polite">{html.escape(words)}</p>'
