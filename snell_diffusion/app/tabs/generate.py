"""Generate: pictures with and without adapters, and what a sparsity level changes."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from snell_diffusion.app.drawing import DrawRequest, Result, Step, values_of
from snell_diffusion.app.pictures import enlarged, png_bytes
from snell_diffusion.app.shared import HIDDEN, PICTURE, PIPELINE, QUIET, Shared, said
from snell_diffusion.app.tabs.listed import listed
from snell_diffusion.app.views.drawing_form import Form
from snell_diffusion.app.views.progress_bar import bar, done, kept_bar, step_bar
from snell_diffusion.app.workspace import Workspace
from snell_diffusion.errors import SnellaValueError

SMALL = 256  # pixels; pictures below this are shown with whole pixels
AS_TRAINED, SET_HERE = "As trained", "Set here"
READY = "<p>Press Draw to see a picture here.</p>"
NO_ADAPTER = "<p>Choose an adapter first: the base model has no update to make sparse.</p>"


def build(shared: Shared) -> None:
    """Fill the tab."""
    GenerateTab(shared)


class GenerateTab:
    """Controls on the left, pictures on the right; below each other on a narrow screen."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        with gr.Row():
            with gr.Column(min_width=300):
                self._controls()
            with gr.Column(min_width=300):
                self._results()
        self._connect()

    def _controls(self) -> None:
        self.form = Form(
            self.shared,
            "generate",
            slots=self.shared.app.limits.together,
            below_adapters=self._upload,
            below_prompt=self._buttons,
            above_details=self._options,
        )

    def _upload(self) -> None:
        self.upload = gr.UploadButton(
            "Upload an adapter (.safetensors)",
            file_types=[".safetensors"],
            size="sm",
            elem_id="generate-upload",
        )
        self.added = gr.JSON(visible=False)
        self.others = gr.HTML(elem_id="generate-left-out")

    def _buttons(self) -> None:
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="generate-draw")
            self.cancel = gr.Button("Cancel", elem_id="generate-cancel", min_width=100)

    def _options(self) -> None:
        self.mode = gr.Radio(
            [AS_TRAINED, SET_HERE],
            value=AS_TRAINED,
            label="Sparsity of the adapters",
            elem_id="generate-sparsity-mode",
        )
        self.level = gr.Slider(
            0,
            1,
            0.5,
            step=0.01,
            label="Sparsity: share of each update that is set to zero",
            info="Let go to see the picture at once. 0 keeps all of the update, 1 nothing.",
            visible=False,
            elem_id="generate-sparsity",
        )
        most = self.shared.app.limits.pictures
        self.count = gr.Slider(
            1, most, 1, step=1, label="Number of pictures", elem_id="generate-count"
        )
        self.compare = gr.Checkbox(
            True, label="Draw the base model's picture too", elem_id="generate-compare"
        )
        self.in_png = gr.Checkbox(
            False,
            label="Write the settings into the PNG",
            info="Prompt, seed, adapters and all else, for whoever gets the file.",
            elem_id="generate-settings-in-png",
        )

    def _results(self) -> None:
        self.bar = gr.HTML(READY, elem_id="generate-progress")
        self.slider = gr.ImageSlider(
            label="Base (left), adapted (right)",
            type="pil",
            format="png",
            interactive=False,
            visible=False,
            elem_id="generate-slider",
        )
        self.kept = gr.HTML("", elem_id="generate-kept")
        with gr.Row(visible=False) as self.pair:
            self.trained = gr.Image(
                label=AS_TRAINED, elem_id="generate-as-trained", min_width=140, **PICTURE
            )
            self.sparse = gr.Image(
                label="At this sparsity", elem_id="generate-sparse", min_width=140, **PICTURE
            )
        self.gallery = gr.Gallery(
            label="Pictures, downloaded in their own size",
            format="png",
            columns=2,
            object_fit="contain",
            interactive=False,
            buttons=["download", "download_all", "fullscreen"],
            elem_id="generate-gallery",
        )

    # Events

    def _connect(self) -> None:
        form = self.form
        level = [self.mode, self.level, *form.inputs]
        pictures = [form.seed, self.bar, self.slider, self.gallery, self.kept]
        pictures += [self.pair, self.trained, self.sparse]
        to_draw = {"outputs": pictures, "show_progress": "hidden", **HIDDEN, **PIPELINE}
        inputs = [self.count, self.compare, self.in_png, form.lock, *level]
        self.draw.click(lambda: bar(0.0, "Waiting for its turn."), outputs=[self.bar], **QUIET)
        events = [
            self.draw.click(said(self._draw), inputs, **to_draw),
            self.level.release(said(self._try_level), level, trigger_mode="always_last", **to_draw),
            self.mode.input(
                lambda mode: gr.update(visible=mode == SET_HERE), [self.mode], [self.level], **QUIET
            ).then(said(self._try_level), level, **to_draw),
        ]
        for event in events:
            event.failure(lambda: READY, outputs=[self.bar], **QUIET)
        self.cancel.click(lambda: "<p>Cancelled.</p>", outputs=[self.bar], cancels=events, **QUIET)
        self._connect_adapters()

    def _connect_adapters(self) -> None:
        first = [self.form.adapters[0]]
        added = self.upload.upload(
            said(self._add),
            [self.upload],
            [self.added],
            api_name="add_adapter",
            api_description="Store an adapter file (.safetensors, checked before it is kept). "
            "Returns its id, its label and the base model it fits.",
        )
        added.success(said(self._select_added), [self.added], first, **QUIET)
        self.shared.on_show("generate", self._left_out, [self.others])
        self.shared.wanted.change(said(self.form.select), [self.shared.wanted], first, **QUIET)

    def _left_out(self, request: gr.Request) -> str:
        found = self.shared.workspace(request).library.left_out()
        return listed("Not in the list", [f"{label}: {reason}." for label, reason in found])

    def _add(self, request: gr.Request, file: str | None) -> dict[str, Any]:
        if file is None:
            raise SnellaValueError("no file came: choose an adapter, a .safetensors file")
        adapter = self.shared.workspace(request).library.add(file)
        return {"id": adapter.id, "label": adapter.label, "base": adapter.base_id}

    def _select_added(self, request: gr.Request, added: dict[str, Any]) -> Any:
        if added["base"] is None:
            gr.Warning(
                f"{added['label']} is stored, but the base model it was trained on is not "
                "offered by this server."
            )
        return self.form.select(request, added["id"])

    # Drawing

    def _draw(
        self,
        request: gr.Request,
        count: int,
        compare: bool,
        in_png: bool,
        locked: bool,
        mode: str,
        level: float,
        *form: Any,
    ) -> Iterator[dict[Any, Any]]:
        values = self.form.values(form)
        if not locked:
            values["seed"] = self.form.any_seed()
        worn = bool(values["adapters"])
        wanted = DrawRequest.of(
            self.shared.app.limits,
            **values,
            count=count,
            sparsity=level if worn and mode == SET_HERE else None,
            compare_with_base=compare if worn else False,
        )
        workspace = self.shared.workspace(request)
        yield {self.form.seed: wanted.seed}
        for news in self.shared.app.studio.draw(wanted, workspace):
            if isinstance(news, Step):
                yield {self.bar: step_bar(news)}
            else:
                yield self._shown(news, wanted, workspace if in_png else None)

    def _shown(
        self, result: Result, wanted: DrawRequest, noted: Workspace | None
    ) -> dict[Any, Any]:
        """Updates that show a result; the settings go into the files of a given workspace."""
        both = gr.update(visible=False)
        if result.base_pictures:
            pair = tuple(enlarged(p[0]) for p in (result.base_pictures, result.pictures))
            both = gr.update(value=pair, visible=True)
        small = max(wanted.width, wanted.height) < SMALL
        files = gr.update(
            value=self._files(result, wanted, noted),
            elem_classes=["whole-pixels"] if small else [],
        )
        return {
            self.bar: done(result.seconds),
            self.slider: both,
            self.gallery: files,
            self.kept: kept_bar(result.kept, result.size, wanted.sparsity) if result.size else "",
        }

    def _files(
        self, result: Result, wanted: DrawRequest, noted: Workspace | None
    ) -> list[tuple[str, str]]:
        """(file, caption) of every picture, at its own size."""
        found = []
        for picture, seed in zip(result.pictures, result.seeds, strict=True):
            notes = None if noted is None else settings_in(noted, wanted, seed)
            content = png_bytes(picture, notes)
            cache = self.gallery.GRADIO_CACHE
            found.append((save_bytes_to_cache(content, f"seed-{seed}.png", cache), f"Seed {seed}"))
        return found

    def _try_level(
        self, request: gr.Request, mode: str, level: float, *form: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw the picture as trained and at the slider's level, from the same seed."""
        values = self.form.values(form)
        if mode == AS_TRAINED or not values["adapters"]:
            yield {
                self.pair: gr.update(visible=False),
                self.kept: "" if mode == AS_TRAINED else NO_ADAPTER,
            }
            return
        limits = self.shared.app.limits
        both = [DrawRequest.of(limits, **values, sparsity=share) for share in (None, level)]
        results: list[Result] = []
        for news in self.shared.app.studio.draw_all(both, self.shared.workspace(request)):
            if isinstance(news, Step):
                yield {self.bar: step_bar(news)}
            else:
                results.append(news)
        trained, sparse = results
        yield {
            self.bar: done(trained.seconds + sparse.seconds),
            self.kept: kept_bar(sparse.kept, sparse.size, level),
            self.pair: gr.update(visible=True),
            self.trained: enlarged(trained.pictures[0]),
            self.sparse: enlarged(sparse.pictures[0]),
        }


def settings_in(workspace: Workspace, wanted: DrawRequest, seed: int) -> dict[str, Any]:
    """What is written into a PNG: the settings of this one picture, adapters by their labels."""
    labels = {name: workspace.library.get(name).label for name, _ in wanted.adapters}
    return {**values_of(wanted, labels), "seed": seed}
