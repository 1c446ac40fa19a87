"""Compare: one labelled grid over two of strength, sparsity, seed, prompt and adapter."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from snell_diffusion.app.compare import KINDS, NO_ADAPTER, Grid, caption, plan, read_axis
from snell_diffusion.app.drawing import Result, Step
from snell_diffusion.app.pictures import labelled_grid, png_bytes
from snell_diffusion.app.shared import HIDDEN, PICTURE, PIPELINE, QUIET, Shared, said
from snell_diffusion.app.views.drawing_form import NOTHING, Form, choices_of
from snell_diffusion.app.views.progress_bar import bar, done, step_bar
from snell_diffusion.app.workspace import Workspace

USUAL = {
    "strength": "0, 0.5, 1",
    "sparsity": "as trained, 0.5, 0.9",
    "seed": "0, 1, 2",
    "prompt": "a photo of a sks cat in the snow\na photo of a sks cat on the beach",
    "adapter": "",
}
READY = "<p>Press Draw to fill the grid.</p>"


def build(shared: Shared) -> None:
    """Fill the tab."""
    CompareTab(shared)


class CompareTab:
    """What changes along rows and columns, what all pictures share, and the grid."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        with gr.Row():
            with gr.Column(min_width=300, scale=2):
                self._axes()
                self.form = Form(
                    shared,
                    "compare",
                    slots=shared.app.limits.together,
                    lockable=False,
                    below_prompt=self._buttons,
                )
            with gr.Column(min_width=300, scale=3):
                self.bar = gr.HTML(READY, elem_id="compare-progress")
                self.grid = gr.Image(
                    label="Grid",
                    show_label=False,  # it would cover the grid's own words
                    alt_text="Pictures in rows and columns with their labels",
                    elem_id="compare-grid",
                    **PICTURE,
                )
                self.file = gr.DownloadButton(
                    "Download the grid (PNG)", interactive=False, elem_id="compare-download"
                )
        self._connect()

    def _axes(self) -> None:
        self.rows, self.down = self._axis("Rows", "strength")
        self.columns, self.across = self._axis("Columns", "sparsity")
        self.chosen = gr.Dropdown(
            [(NO_ADAPTER, NOTHING)],
            value=[],
            multiselect=True,
            label="Adapters to compare",
            info="Each takes the strength of the first adapter below.",
            visible=False,
            elem_id="compare-adapters",
        )

    def _axis(self, label: str, kind: str) -> tuple[gr.Dropdown, gr.Textbox]:
        name = f"compare-{label.lower()}"
        with gr.Row():
            kinds = gr.Dropdown(
                [(known.capitalize(), known) for known in KINDS],
                value=kind,
                label=f"{label} change the",
                elem_id=name,
                min_width=120,
            )
            text = gr.Textbox(
                USUAL[kind],
                label="Values",
                info="Numbers with commas; prompts one a line.",
                lines=1,
                max_lines=8,
                max_length=self.shared.app.limits.cells * self.shared.app.limits.prompt,
                elem_id=f"{name}-values",
                min_width=160,
            )
        return kinds, text

    def _buttons(self) -> None:
        with gr.Row():
            self.draw = gr.Button("Draw the grid", variant="primary", elem_id="compare-draw")
            self.cancel = gr.Button("Cancel", elem_id="compare-cancel", min_width=100)

    # Events

    def _connect(self) -> None:
        axes = [self.rows, self.down, self.columns, self.across, self.chosen]
        self.draw.click(lambda: bar(0.0, "Waiting for its turn."), outputs=[self.bar], **QUIET)
        drawn = self.draw.click(
            said(self._draw),
            [*axes, *self.form.inputs],
            [self.bar, self.grid, self.file],
            show_progress="hidden",
            **HIDDEN,
            **PIPELINE,
        )
        drawn.failure(lambda: READY, outputs=[self.bar], **QUIET)
        self.cancel.click(lambda: "<p>Cancelled.</p>", outputs=[self.bar], cancels=[drawn], **QUIET)
        for kinds, text in ((self.rows, self.down), (self.columns, self.across)):
            kinds.input(_values_for, [kinds], [text], **QUIET)
            kinds.change(
                lambda down, across: gr.update(visible="adapter" in (down, across)),
                [self.rows, self.columns],
                [self.chosen],
                **QUIET,
            )
        self.shared.on_show("compare", self._refreshed, [self.chosen], [self.chosen])

    def _refreshed(self, request: gr.Request, chosen: list[str] | None) -> Any:
        choices = [(NO_ADAPTER, NOTHING), *choices_of(self.shared.workspace(request))[1:]]
        known = {name for _, name in choices}
        return gr.update(choices=choices, value=[name for name in chosen or [] if name in known])

    def _draw(
        self,
        request: gr.Request,
        rows: str,
        down: str,
        columns: str,
        across: str,
        chosen: list[str] | None,
        *form: Any,
    ) -> Iterator[dict[Any, Any]]:
        workspace = self.shared.workspace(request)
        common = self.form.values(form)
        names = labels_of(workspace, [*(chosen or []), *(name for name, _ in common["adapters"])])
        limits = self.shared.app.limits
        vertical = read_axis(rows, down, chosen or [], names, limits)
        horizontal = read_axis(columns, across, chosen or [], names, limits)
        grid = plan(common, vertical, horizontal, limits)
        results: list[Result] = []
        for news in self.shared.app.studio.draw_all(grid.requests, workspace):
            if isinstance(news, Step):
                yield {self.bar: step_bar(news)}
            else:
                results.append(news)
        yield self._shown(grid, results, caption(common, {rows, columns}, names))

    def _shown(self, grid: Grid, results: list[Result], text: str) -> dict[Any, Any]:
        pictures = [result.pictures[0] for result in results]
        made = labelled_grid(grid.in_rows(pictures), grid.rows.labels, grid.columns.labels, text)
        path = save_bytes_to_cache(png_bytes(made), "comparison.png", self.file.GRADIO_CACHE)
        return {
            self.bar: done(sum(result.seconds for result in results)),
            self.grid: made,
            self.file: gr.update(value=path, interactive=True),
        }


def labels_of(workspace: Workspace, adapters: list[str]) -> dict[str, str]:
    """Labels by id; of the base model alone there is none."""
    return {name: workspace.library.get(name).label for name in adapters if name}


def _values_for(kind: str) -> Any:
    """The usual values of a kind; adapters are chosen from the list instead."""
    return gr.update(
        value=USUAL[kind], visible=kind != "adapter", lines=3 if kind == "prompt" else 1
    )
