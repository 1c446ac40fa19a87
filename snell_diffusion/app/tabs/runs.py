"""Runs: a table of all runs, and everything about the one that is chosen."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from snell_diffusion.app.job_record import JobStatus
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.progress import UNKNOWN, Summary, duration, moment, subject, summaries
from snell_diffusion.app.run_files import file_name, log_text, model_card, settings_text
from snell_diffusion.app.shared import HIDDEN, QUIET, Shared, said
from snell_diffusion.app.views.files import cached, cached_text
from snell_diffusion.app.views.run import Part, run_view
from snell_diffusion.errors import SnellaValueError

HEADERS = ("Subject", "Base", "Method", "Status", "Time", "Steps", "Best loss", "Started", "Run")
WIDTHS = ("130px", "130px", "90px", "110px", "130px", "130px", "110px", "180px", "110px")
SHORT = 8  # digits of an id in the table
NONE = "There are no runs yet: start one in the first tab."
CHOOSE = (
    "Choose a run below or click its row. *Best loss* is the smallest loss on photos that were "
    "held out: lower is better, compare it among runs of the same photos only."
)


def build(shared: Shared) -> None:
    """Fill the tab."""
    hint = gr.Markdown(NONE, elem_id="runs-hint")
    table = gr.Dataframe(
        headers=list(HEADERS),
        datatype="str",
        interactive=False,
        column_widths=list(WIDTHS),
        show_search="search",
        max_height=320,
        label="Runs",
        elem_id="runs-table",
    )
    run = gr.Dropdown([], value=None, label="Run", elem_id="runs-choice")
    saved, card, files, delete = _kept()
    with gr.Column(visible=False, elem_id="runs-details") as details:
        more = [hint, table, details, saved, card, files, delete]
        run_view(shared, run, "runs-run", more, _parts)
        with gr.Accordion("Saved states", open=False):
            saved.render()
        with gr.Accordion("Model card", open=False):
            card.render()
        files.render()
        delete.render()
        _question(shared, delete, run, [hint, table, run])
    shared.on_show("runs", _fill(shared), [hint, table, run], [run])
    table.select(_clicked(shared), None, [run], **QUIET)


def _kept() -> tuple[gr.Dataframe, gr.Markdown, gr.File, gr.Button]:
    """What a run leaves, and how to get rid of it; placed later."""
    saved = gr.Dataframe(
        headers=["Step", "Size", "Saved"],
        datatype="str",
        interactive=False,
        label="States that the run can continue from, newest last",
        elem_id="runs-checkpoints",
        render=False,
    )
    card = gr.Markdown(elem_id="runs-card", sanitize_html=True, render=False)
    files = gr.File(
        label="Download: adapter, settings, log",
        file_count="multiple",
        interactive=False,
        elem_id="runs-download",
        render=False,
    )
    delete = gr.Button("Delete this run...", variant="stop", elem_id="runs-delete", render=False)
    return saved, card, files, delete


def _question(shared: Shared, ask: gr.Button, run: gr.Dropdown, rows: Sequence[Any]) -> None:
    """What comes between asking to delete a run and deleting it."""
    with gr.Row(visible=False) as question:
        gr.Markdown("Delete this run with its photos, pictures, saved states and adapter?")
        yes = gr.Button("Yes, delete it", variant="stop", elem_id="runs-delete-yes")
        no = gr.Button("No, keep it", elem_id="runs-delete-no")

    def delete(job: str | None, request: gr.Request) -> tuple[Any, ...]:
        jobs = shared.workspace(request).jobs
        jobs.delete(job or "")
        return *_rows(jobs, None), gr.update(visible=False)

    ask.click(lambda: gr.update(visible=True), None, [question], **QUIET)
    no.click(lambda: gr.update(visible=False), None, [question], **QUIET)
    run.change(lambda: gr.update(visible=False), None, [question], **QUIET)
    yes.click(said(delete), [run], [*rows, question], **HIDDEN)


def _fill(shared: Shared) -> Callable[..., tuple[Any, ...]]:
    def fill(job: str | None, request: gr.Request) -> tuple[Any, ...]:
        return _rows(shared.workspace(request).jobs, job)

    return said(fill)


def _rows(jobs: Jobs, job: str | None) -> tuple[Any, ...]:
    """Hint, table and list of runs, with `job` still chosen if it is there."""
    found = summaries(jobs)
    values = [_row(row) for row in found]
    return CHOOSE if found else NONE, values, _choice(jobs, job)


def _choice(jobs: Jobs, job: str | None) -> Any:
    """The list of runs as it is now, with `job` chosen if it is there."""
    infos = {each: jobs.info(each) for each in jobs.all()}
    choices = [(f"{_name(info)} ({each[:SHORT]})", each) for each, info in infos.items()]
    return gr.update(choices=choices, value=job if job in infos else None)


def _name(info: dict[str, Any]) -> str:
    return f"{subject(info)}, {moment(info['started'])}"


def _row(row: Summary) -> list[str]:
    loss = UNKNOWN if row.best_loss is None else f"{row.best_loss:.4f}"
    time_ = duration(row.seconds)
    first = [row.subject, row.base, row.method, row.status, time_, row.steps]
    return [*first, loss, row.started, row.job[:SHORT]]


def _clicked(shared: Shared) -> Callable[..., Any]:
    def clicked(request: gr.Request, event: gr.SelectData) -> Any:
        # The table may be sorted or searched: the row itself says which run it is.
        short = str((event.row_value or [""])[-1])
        jobs = shared.workspace(request).jobs
        found = [job for job in jobs.all() if job[:SHORT] == short]
        if not found:
            raise SnellaValueError("this run is no longer there; choose another from the list")
        return _choice(jobs, found[0])

    return said(clicked)


def _parts(jobs: Jobs, run: str | None, status: JobStatus | None) -> dict[str, Part]:
    """What this tab shows besides the view: made anew when the run or its state is another."""
    now = (run, None if status is None else status.state)
    going = status is not None and status.running
    saved = _saved(jobs, run) if run else []
    rows: list[Any] = []  # hint and table come from one look at all runs

    def row(index: int) -> Any:
        rows.extend(_rows(jobs, run) if not rows else ())
        return rows[index]

    return {
        "hint": (now, lambda: row(0)),
        "table": (now, lambda: row(1)),
        "details": (run is not None, lambda: gr.update(visible=run is not None)),
        "saved": (saved, lambda: [_state(*state) for state in saved]),
        "card": (now, lambda: model_card(jobs, run) if run else ""),
        "files": (now, lambda: files(jobs, run) if run else None),
        "delete": (going, lambda: gr.update(interactive=not going)),
    }


def _saved(jobs: Jobs, job: str) -> list[tuple[int, int, float]]:
    return [(state.step, state.size, state.saved) for state in jobs.checkpoints(job)]


def _state(step: int, size: int, saved: float) -> list[str]:
    moment = time.strftime("%d %b %Y %H:%M:%S", time.localtime(saved))
    return [str(step), f"{size / 2**20:.1f} MB", moment]


def files(jobs: Jobs, job: str) -> list[str]:
    """Copies of the run's files for the visitor, named by the run."""
    label = jobs.info(job)["label"]
    found = [cached_text(settings_text(jobs, job), file_name(label, "settings.yaml"))]
    if jobs.has_adapter(job):
        found.insert(0, cached(jobs.adapter(job), file_name(label, "adapter.safetensors")))
    if not jobs.status(job).running:
        found.append(cached_text(log_text(jobs, job), file_name(label, "log.txt")))
    return found
