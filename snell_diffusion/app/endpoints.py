"""Every public action as an endpoint for programs: typed, described, with errors as sentences.

Two more, for uploads, are events of the page: /add_photos and /add_adapter. Their files must come
through the upload of the page, which endpoints without components do not check. What endpoints take
is checked by the same plain functions that the page uses: gradio passes on any JSON.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from snell_diffusion.app import answers, personalize
from snell_diffusion.app.compare import caption, plan, read_axis
from snell_diffusion.app.drawing import DrawRequest, Result, Step
from snell_diffusion.app.pictures import labelled_grid, png_bytes
from snell_diffusion.app.presets import KINDS
from snell_diffusion.app.shared import PIPELINE, Shared, said, translated
from snell_diffusion.app.workspace import Workspace
from snell_diffusion.errors import SnellaError, SnellaValueError

FAULT = (
    "this is a fault of the page, not yours; whoever started the server finds the cause in its log"
)
MEASURE: dict[str, Any] = {"concurrency_id": "inspect", "concurrency_limit": 1}
AT_ONCE: dict[str, Any] = {"queue": False}


def register(shared: Shared) -> None:
    """Make the endpoints; called while the page is built."""
    calls = Endpoints(shared)
    told = (calls.bases, calls.presets, calls.photos, calls.captions, calls.runs, calls.status)
    asked = (calls.pause, calls.stop, calls.resume, calls.delete_run, calls.delete_adapter)
    listed = (calls.adapters, calls.adapter_file, calls.samples, calls.delete_photos)
    for call in (*told, *asked, *listed):
        _expose(shared, call, AT_ONCE)
    for call in (calls.estimate, calls.train):
        _expose(shared, call, {})
    for call in (calls.generate, calls.compare):
        _expose(shared, call, PIPELINE)
    for call in (calls.inspect, calls.overlap):
        _expose(shared, call, MEASURE)


def _expose(shared: Shared, call: Callable[..., Any], how: dict[str, Any]) -> None:
    text = " ".join((call.__doc__ or "").format(limits=shared.app.limits).split())
    gr.api(said(sure(call)), api_name=call.__name__, api_description=text, **how)


def sure(function: Callable[..., Any]) -> Callable[..., Any]:
    """Answer an unexpected error with a sentence; what it was goes to the server's log only."""
    return translated(function, Exception, _told)


def _told(error: Exception) -> Exception:
    if isinstance(error, (SnellaError, gr.Error)):
        return error
    traceback.print_exception(error)
    return SnellaError(FAULT)


class Endpoints:
    """The endpoints; every argument is what a stranger sent."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._app = shared.app

    def _own(self, request: gr.Request) -> Workspace:
        return self._shared.workspace(request)

    # -- photos and training ----------------------------------------------------------------------

    def bases(self) -> list[dict]:
        """The base models: id, label, native resolution and sides in pixels, and the steps and
        guidance they draw best with. The first one is the default."""
        return [answers.base_values(base) for base in self._app.bases.all()]

    def presets(self) -> dict:
        """The kinds of subjects ("presets") and how long to train ("efforts"), each with its id,
        label and hint."""
        return answers.preset_rows()

    def photos(self, draft: str, request: gr.Request) -> dict:
        """The photos of a draft, by the id that /add_photos answered, with their captions."""
        return answers.draft_values(self._own(request).drafts.get(draft))

    def captions(self, draft: str, texts: list[str], request: gr.Request) -> dict:
        """Say what each photo shows beside the subject, such as "on a wooden floor": one text per
        photo, in their order, each of up to {limits.prompt} characters; "" takes it back."""
        drafts = self._own(request).drafts
        count = len(drafts.get(draft).stored)
        if len(_texts(texts, "texts")) != count:
            raise SnellaValueError(f"there are {count} photos: give a list of {count} captions")
        for index, text in enumerate(texts):
            drafts.caption(draft, index, text)
        return answers.draft_values(drafts.get(draft))

    def delete_photos(self, draft: str, request: gr.Request) -> str:
        """Delete a draft with all its photos; runs that were started from it keep their copies."""
        self._own(request).drafts.delete(draft)
        return "The photos are deleted."

    def estimate(self, request: gr.Request, base: str = "embedded", preset: str = "object") -> dict:
        """Time (seconds) and memory (bytes) that each effort will take on this machine; null where
        it is not known yet."""
        if preset not in list(KINDS):  # any JSON may come, also what cannot be a key
            raise SnellaValueError("choose a preset: pet, object or style")
        known = self._app.bases.get(base)
        found = personalize.estimates_of(self._app, self._own(request), known, preset, {})
        return answers.estimate_rows(found)

    def train(
        self,
        request: gr.Request,
        draft: str,
        subject: str,
        word: str = "",
        preset: str = "object",
        effort: str = "balanced",
        base: str = "embedded",
        steps: int | None = None,
        seed: int = 0,
        settings: dict | None = None,
    ) -> str:
        """Start a training and return its id. draft: id of the photos. subject: one or two English
        words, such as cat. word: what means the subject in prompts, such as sks or a new word in
        brackets, <mika>; "" chooses it. preset: pet, object or style. effort: quick, balanced or
        thorough. base: id of a base model. steps: 1 to {limits.train_steps} optimizer steps in
        place of the effort's. seed: 0 to {limits.seed}. settings: other settings of the command
        line by name. One run trains at a time."""
        values = {"draft": draft, "subject": subject, "word": word, "preset": preset}
        more = {"effort": effort, "base": base, "steps": steps, "seed": seed}
        if not isinstance(settings, dict | None):
            raise SnellaValueError('settings must be given by name, such as {"rank": 8}')
        wanted = personalize.make_request(**values, **more, overrides=settings or {})
        return personalize.start(self._app, self._own(request), wanted)

    # -- runs -------------------------------------------------------------------------------------

    def runs(self, request: gr.Request) -> list[dict]:
        """All runs, newest first: id, label, subject, base, method, status, seconds, steps and
        best held-out loss."""
        return answers.run_rows(self._own(request).jobs)

    def status(self, run: str, request: gr.Request) -> dict:
        """Where a run is: state, step, total steps, seconds left (eta_s), whether it is running,
        and a sentence."""
        return answers.status_values(self._own(request).jobs, run)

    def samples(self, run: str, request: gr.Request) -> list[dict]:
        """The sample pictures that a run has drawn so far: optimizer step and picture, oldest
        first; step 0 is the untrained base."""
        found = self._own(request).jobs.samples(run)
        return [{"step": step, "picture": _file(path)} for step, path in found]

    def pause(self, run: str, request: gr.Request) -> dict:
        """Ask a run to save its state and end; /resume continues it. Answers its status now."""
        return self._asked(request, run, "pause")

    def stop(self, run: str, request: gr.Request) -> dict:
        """Ask a run to save its state and its adapter and end. Answers its status now."""
        return self._asked(request, run, "stop")

    def resume(self, run: str, request: gr.Request) -> dict:
        """Continue a paused, stopped or failed run from its newest state, to the same result as if
        it had never ended."""
        return self._asked(request, run, "resume")

    def _asked(self, request: gr.Request, run: str, what: str) -> dict:
        jobs = self._own(request).jobs
        getattr(jobs, what)(run)
        return answers.status_values(jobs, run)

    def delete_run(self, run: str, request: gr.Request) -> str:
        """Delete a run with its photos, pictures, states and adapter. It must not be going."""
        self._own(request).jobs.delete(run)
        return "The run is deleted."

    # -- adapters ---------------------------------------------------------------------------------

    def adapters(self, request: gr.Request) -> list[dict]:
        """The adapters of runs and the uploaded ones: id, label, base that it fits (null: none
        here), whether it was uploaded, and the prompt it was trained with."""
        return [answers.adapter_values(row) for row in self._own(request).library.all()]

    def adapter_file(self, adapter: str, request: gr.Request) -> dict:
        """The file of an adapter, .safetensors."""
        return _file(self._own(request).library.get(adapter).path)

    def delete_adapter(self, adapter: str, request: gr.Request) -> str:
        """Delete an uploaded adapter; one of a run goes with its run."""
        self._own(request).library.delete(adapter)
        return "The adapter is deleted."

    def inspect(self, adapter: str, request: gr.Request) -> dict:
        """What an adapter file is: facts (format, digest check, base, method, levels), and for
        each layer its kept share and the Frobenius norms of its update and of the base's weight."""
        found = self._own(request).library.get(adapter)
        return answers.inspection_values(found, self._app.bases)

    def overlap(self, adapter: str, other: str, request: gr.Request) -> dict:
        """How much two adapters will interfere when used together: interference 0 to 1, agreement
        -1 to 1, their product cosine, the share of weights that both change, and a sentence."""
        library = self._own(request).library
        return answers.overlap_values([library.get(adapter), library.get(other)])

    # -- drawing ----------------------------------------------------------------------------------

    def generate(
        self,
        request: gr.Request,
        prompt: str,
        base: str = "embedded",
        adapters: list | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        count: int = 1,
        sparsity: float | None = None,
        compare_with_base: bool = False,
    ) -> dict:
        """Draw 1 to {limits.pictures} pictures. prompt: up to {limits.prompt} characters.
        adapters: list of [id, strength], strength 0 to {limits.strength}, 1 is as trained; up to
        {limits.together}. seed: 0 to {limits.seed}; further pictures have the next ones. steps: 1
        to {limits.draw_steps} denoising steps. guidance: 0 to {limits.guidance}. width, height: in
        pixels, see /bases. sparsity: share of zeros in each update, 0 to 1. Values that are left
        out are the base's own. Answers pictures, base_pictures (with compare_with_base), seeds,
        kept_share and seconds; while it works, phase, done and total steps."""
        fields = self._fields(base, steps, guidance, width, height)
        fields |= {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        wanted = DrawRequest.of(
            self._app.limits,
            **fields,
            adapters=adapters or [],
            count=count,
            sparsity=sparsity,
            compare_with_base=compare_with_base,
        )
        for news in self._app.studio.draw(wanted, self._own(request)):
            yield _progress(news) if isinstance(news, Step) else _drawn(news)

    def compare(
        self,
        request: gr.Request,
        prompt: str,
        rows: str = "seed",
        row_values: str = "0, 1",
        columns: str = "sparsity",
        column_values: str = "as trained, 0.5, 0.9",
        adapters: list | None = None,
        compared: list[str] | None = None,
        base: str = "embedded",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> dict:
        """Draw a grid of up to {limits.cells} pictures and answer it as one labelled PNG
        ("picture"). rows, columns: two of strength, sparsity, seed, prompt, adapter. row_values,
        column_values: numbers separated by commas ("as trained" is a sparsity), prompts one a
        line; for adapters give their ids in compared, "" is the base alone. The rest as in
        /generate."""
        workspace, limits = self._own(request), self._app.limits
        common = {**self._fields(base, steps, guidance, None, None), "prompt": prompt, "seed": seed}
        common["adapters"] = DrawRequest.of(limits, **common, adapters=adapters or []).adapters
        chosen = _texts(compared or [], "compared")
        ids = [*chosen, *(name for name, _ in common["adapters"])]
        names = {name: workspace.library.get(name).label for name in ids if name}
        down = read_axis(rows, row_values, chosen, names, limits)
        across = read_axis(columns, column_values, chosen, names, limits)
        grid = plan(common, down, across, limits)
        pictures: list[Image.Image] = []
        for news in self._app.studio.draw_all(grid.requests, workspace):
            if isinstance(news, Step):
                yield _progress(news)
            else:
                pictures.append(news.pictures[0])
        text = caption(common, {rows, columns}, names)
        sheet = labelled_grid(grid.in_rows(pictures), down.labels, across.labels, text)
        yield {"picture": _picture(sheet, "comparison")}

    def _fields(
        self,
        base: str,
        steps: int | None,
        guidance: float | None,
        width: int | None,
        height: int | None,
    ) -> dict[str, Any]:
        known = self._app.bases.get(base)
        return {
            "base": known.id,
            "steps": known.steps if steps is None else steps,
            "guidance": known.guidance if guidance is None else guidance,
            "width": known.resolution if width is None else width,
            "height": known.resolution if height is None else height,
        }


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise SnellaValueError(f"{name} must be a list of texts")
    return values


def _progress(step: Step) -> dict[str, Any]:
    return {"phase": step.phase, "done": step.done, "total": step.total}


def _drawn(result: Result) -> dict[str, Any]:
    return {
        "pictures": [_picture(picture) for picture in result.pictures],
        "base_pictures": [_picture(picture, "base") for picture in result.base_pictures],
        "seeds": list(result.seeds),
        "kept_share": result.kept_share,
        "seconds": result.seconds,
    }


def _picture(picture: Image.Image, name: str = "picture") -> dict[str, Any]:
    """A picture as a file that clients download."""
    return _cached(png_bytes(picture), f"{name}.png")


def _file(path: Path) -> dict[str, Any]:
    """A copy of a file of the workspace that clients download."""
    return _cached(path.read_bytes(), path.name)


def _cached(content: bytes, name: str) -> dict[str, Any]:
    path = save_bytes_to_cache(content, name, get_upload_folder())
    return gr.FileData(path=path, orig_name=name).model_dump()
