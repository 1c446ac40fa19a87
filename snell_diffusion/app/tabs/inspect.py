"""Inspect: what an adapter file is, where its update lies, and how two of them go together."""

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from snell_diffusion.app.bars import bars
from snell_diffusion.app.inspection import (
    LayerFact,
    LayerSize,
    Overlap,
    facts,
    layer_facts,
    overlap,
    read,
    size_sentence,
    sizes_of,
)
from snell_diffusion.app.library import Adapter
from snell_diffusion.app.shared import HIDDEN, PICTURE, Shared, said
from snell_diffusion.app.workspace import Workspace

NOTHING = ""  # what a list of adapters holds while none is chosen
MEASURE: dict[str, Any] = {"concurrency_id": "inspect", "concurrency_limit": 1, **HIDDEN}
HEADINGS = ["Layer", "Out", "In", "Sparsity", "Kept", "|ΔW|", "|ΔW| / |W|"]
PAIR_HEADINGS = ["Layer", "Both change", "Interference", "Cosine"]
EMPTY = "<p>Choose an adapter to see what it is.</p>"
NO_PAIR = "<p>Choose a second adapter to see how the two go together.</p>"


def build(shared: Shared) -> None:
    """Fill the tab."""
    InspectTab(shared)


class InspectTab:
    """The file on the left, its update on the right, a second adapter below."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        with gr.Row():
            with gr.Column(min_width=300):
                self._file()
            with gr.Column(min_width=300):
                self._update()
        self._pair()
        self._connect()

    def _file(self) -> None:
        self.adapter = _adapters(
            "Adapter", "What was trained in the Personalize tab, or uploaded.", "inspect-adapter"
        )
        self.upload = gr.UploadButton(
            "Upload an adapter (.safetensors)",
            file_types=[".safetensors"],
            size="sm",
            elem_id="inspect-upload",
        )
        self.facts = gr.HTML(EMPTY, elem_id="inspect-facts")

    def _update(self) -> None:
        self.map = gr.Image(
            label="Share of its weights that each layer changes", elem_id="inspect-map", **PICTURE
        )
        self.sizes = gr.Image(
            label="Size of each layer's update against the base's weights",
            elem_id="inspect-sizes",
            **PICTURE,
        )
        self.size_text = gr.HTML("", elem_id="inspect-size-text")
        with gr.Accordion("All layers as a table", open=False):
            self.layers = gr.Dataframe(
                headers=HEADINGS,
                interactive=False,
                wrap=True,
                show_search="filter",
                elem_id="inspect-layers",
            )

    def _pair(self) -> None:
        self.other = _adapters(
            "Second adapter",
            "To see how much the two will interfere when both are used for one picture.",
            "inspect-other",
        )
        with gr.Row():
            with gr.Column(min_width=300):
                self.overlap = gr.HTML(NO_PAIR, elem_id="inspect-overlap")
            with gr.Column(min_width=300):
                self.meeting = gr.Image(
                    label="How much both work on the same weights, by layer",
                    visible=False,
                    elem_id="inspect-overlap-map",
                    **PICTURE,
                )
        with gr.Accordion("All layers of both as a table", open=False):
            self.pairs = gr.Dataframe(
                headers=PAIR_HEADINGS, interactive=False, wrap=True, elem_id="inspect-pairs"
            )

    def _connect(self) -> None:
        lists = [self.adapter, self.other]
        self.shared.on_show("inspect", self._refresh, lists, lists)
        first = [self.facts, self.map, self.layers, self.sizes, self.size_text]
        pair = [self.overlap, self.meeting, self.pairs]
        shown = self.adapter.change(
            said(self._show), [self.adapter], first, show_progress="hidden", **MEASURE
        )
        measured = [self.sizes, self.size_text, self.layers]
        shown.success(said(self._measure), [self.adapter], measured, **MEASURE)
        for changed in lists:
            changed.change(said(self._compare), lists, pair, show_progress="minimal", **MEASURE)
        self.upload.upload(said(self._add), [self.upload], lists, **HIDDEN)

    # Handlers

    def _refresh(self, request: gr.Request, *chosen: str | None) -> Any:
        known = self.shared.workspace(request).library.all()
        ids = {adapter.id for adapter in known}
        return tuple(_choices(known, name if name in ids else NOTHING) for name in chosen)

    def _add(self, request: gr.Request, file: str | None) -> Any:
        library = self.shared.workspace(request).library
        if file is None:
            return gr.skip(), gr.skip()
        adapter = library.add(file)
        return _choices(library.all(), adapter.id), gr.update(choices=_pairs(library.all()))

    def _show(self, request: gr.Request, chosen: str | None) -> Any:
        if not chosen:
            return EMPTY, None, [], None, ""
        adapter, file = self._read(self.shared.workspace(request), chosen)
        rows = layer_facts(file.header)
        shares = [row.kept_share for row in rows]
        picture = bars([row.block for row in rows], shares, top=1.0)
        found = facts(adapter, file, self.shared.app.bases)
        return table(found), picture, layer_table(rows), None, "<p>Measuring the update …</p>"

    def _measure(self, request: gr.Request, chosen: str | None) -> Any:
        if not chosen:
            return None, "", gr.skip()
        adapter, file = self._read(self.shared.workspace(request), chosen)
        rows, measured = layer_facts(file.header), sizes_of(adapter, self.shared.app.bases)
        picture = bars([row.block for row in rows], [row.ratio for row in measured])
        text = f"<p>{html.escape(size_sentence(measured))}</p>"
        return picture, text, layer_table(rows, measured)

    def _compare(self, request: gr.Request, chosen: str | None, other: str | None) -> Any:
        hidden = gr.update(value=None, visible=False)
        if not chosen or not other:
            return NO_PAIR, hidden, []
        if chosen == other:
            return "<p>This is the same adapter twice: choose another one.</p>", hidden, []
        workspace = self.shared.workspace(request)
        files = [self._read(workspace, name)[1] for name in (chosen, other)]
        found = overlap(*files)
        if not found.layers:
            return pair_html(found), hidden, []
        blocks = {row.name: row.block for row in layer_facts(files[0].header)}
        picture = bars(
            [blocks[row.name] for row in found.layers],
            [row.interference for row in found.layers],
            top=1.0,
        )
        return pair_html(found), gr.update(value=picture, visible=True), pair_table(found)

    def _read(self, workspace: Workspace, chosen: str) -> tuple[Adapter, Any]:
        adapter = workspace.library.get(chosen)
        return adapter, read(adapter)


def _adapters(label: str, info: str, elem_id: str) -> gr.Dropdown:
    return gr.Dropdown(
        [("No adapter", NOTHING)], value=NOTHING, label=label, info=info, elem_id=elem_id
    )


def _pairs(adapters: Sequence[Adapter]) -> list[tuple[str, str]]:
    return [("No adapter", NOTHING), *((adapter.label, adapter.id) for adapter in adapters)]


def _choices(adapters: Sequence[Adapter], value: str) -> Any:
    return gr.update(choices=_pairs(adapters), value=value)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values as an HTML table; whatever a file says stays text."""
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def layer_table(
    rows: Sequence[LayerFact], measured: Sequence[LayerSize] | None = None
) -> list[list[Any]]:
    """One row per layer under HEADINGS; sizes are empty before they are measured."""
    sizes = measured or [None] * len(rows)
    return [
        [
            *(row.name, *row.shape, round(row.sparsity, 4), round(row.kept_share, 4)),
            None if size is None else float(f"{size.update:.3g}"),
            None if size is None or size.ratio is None else float(f"{size.ratio:.3g}"),
        ]
        for row, size in zip(rows, sizes, strict=True)
    ]


def pair_html(found: Overlap) -> str:
    """The verdict on two adapters, and the figures behind it."""
    alone = " and ".join(f"{count:,}" for count in found.only)
    rows = [
        ("Layers that both change", f"{len(found.layers):,}"),
        ("Layers that one alone changes", alone),
        ("Weights that both change", f"{found.shared:.1%} of those that either changes"),
        ("Interference", f"{found.interference:.2f} (0: none, 1: the same weights throughout)"),
        ("Agreement", f"{found.agreement:+.2f} (+1: the same directions, -1: opposite ones)"),
    ]
    return f"<p><strong>{html.escape(found.sentence())}</strong></p>{table(rows)}"


def pair_table(found: Overlap) -> list[list[Any]]:
    """One row per common layer under PAIR_HEADINGS."""
    return [
        [row.name, round(row.shared, 4), round(row.interference, 4), round(row.cosine, 4)]
        for row in found.layers
    ]
