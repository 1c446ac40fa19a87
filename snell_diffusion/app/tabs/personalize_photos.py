"""First step of Personalize: photos in, thumbnails and problems out, captions and removing."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from snell_diffusion.app.drafts import Photo
from snell_diffusion.app.form import Form, restored
from snell_diffusion.app.shared import HIDDEN, QUIET, Shared, said
from snell_diffusion.app.tabs.listed import listed
from snell_diffusion.app.workspace import Workspace
from snell_diffusion.errors import SnellaError

THUMBNAIL = 256  # pixels
INTRO = """Choose **5 to 10 photos** of one thing: your cat, a cup, drawings in one style. Change
everything but the thing itself: place, light, side, distance."""
CAPTION = (
    "What else is in the photo? Optional. What you name here, for example 'on a wooden floor', is "
    "not learned as part of your subject."
)


@dataclass(frozen=True)
class PhotoStep:
    """The components that others need.

    Attributes:
        draft: Id of the photos, not shown.
        shown: What `show` fills, in its order.
        following: Button to the next step.
    """

    draft: gr.Textbox
    shown: list[Any]
    following: gr.Button


def build_photos(shared: Shared, kept: gr.BrowserState) -> PhotoStep:
    """The step's components and events.

    Args:
        shared: The page.
        kept: The form in the browser, whose draft is set here.
    """
    gr.Markdown(INTRO)
    limits = shared.app.limits
    files = gr.File(
        label=f"Photos: PNG, JPEG or WebP, up to {limits.photos}",
        file_count="multiple",
        file_types=[".png", ".jpg", ".jpeg", ".webp"],
        height=140,
        elem_id="personalize-photos",
    )
    draft = gr.Textbox(label="Draft", visible=False)
    added = gr.JSON(label="Added photos", visible=False)
    problems = gr.HTML(elem_id="personalize-problems")
    notes = gr.HTML(elem_id="personalize-notes")
    gallery = gr.Gallery(
        label="Your photos: choose one to describe or remove it",
        show_label=False,
        columns=5,
        height=None,
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        visible=False,
        elem_id="personalize-thumbnails",
    )
    chosen = gr.State(None)
    with gr.Group(visible=False, elem_id="personalize-captions") as card:
        caption = gr.Textbox(
            label="Caption",
            info=CAPTION,
            max_length=limits.prompt,
            elem_id="personalize-caption",
        )
        remove = gr.Button("Remove this photo", size="sm", elem_id="personalize-remove")
    with gr.Row():
        over = gr.Button("Start over", visible=False, elem_id="personalize-over")
        following = gr.Button(
            "Next", variant="primary", interactive=False, elem_id="personalize-next-1"
        )
    shown = [kept, draft, notes, gallery, card, chosen, over, following]
    step = PhotoStep(draft, shown, following)

    event = files.upload(
        _add(shared),
        [files, draft],
        [added],
        api_name="add_photos",
        concurrency_id="photos",
        concurrency_limit=1,
    )
    event.success(_added(shared), [added, kept], [problems, *shown], **QUIET)
    event.then(lambda: None, None, [files], **QUIET)
    gallery.select(_chosen(shared), [draft], [chosen, card, caption], **QUIET)
    caption.input(_captioned(shared), [draft, chosen, caption], None, **QUIET)
    described = _described(shared)
    gr.on([caption.blur, caption.submit], described, [draft, chosen, caption], [gallery], **QUIET)
    remove.click(_removed(shared), [kept, draft, chosen], shown, **HIDDEN)
    over.click(_over(shared), [kept, draft], [problems, *shown], **HIDDEN)
    return step


def show(shared: Shared, workspace: Workspace, form: Form) -> list[Any]:
    """What the step shows of a form's photos: values for `PhotoStep.shown`."""
    side = shared.app.bases.get(form.base).resolution
    found = workspace.drafts.get(form.draft, side) if form.draft else None
    photos = found.stored if found else []
    count = len(photos)
    return [
        form.stored(),
        found.id if found else "",
        listed("Worth a look", found.notes if found else []),
        gr.update(value=_thumbnails(photos), visible=count > 0),
        gr.update(visible=False),
        None,
        gr.update(visible=count > 0),
        gr.update(interactive=count > 0),
    ]


def known_draft(workspace: Workspace, form: Form) -> str | None:
    """The form's photos, else those that were changed last: a browser may have forgotten them."""
    for draft in (form.draft, workspace.drafts.latest()):
        with suppress(SnellaError):  # removed in another window, or another user's
            return draft if workspace.drafts.photos(draft or "") else None
    return None


def _thumbnails(photos: Sequence[Photo]) -> list[tuple[Image.Image, str]]:
    found = []
    for photo in photos:
        assert photo.file is not None
        text = f"{photo.name}: {photo.caption}" if photo.caption else photo.name
        with suppress(FileNotFoundError):  # removed meanwhile
            found.append((_thumbnail(photo.file), text))
    return found


def _thumbnail(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return picture.convert("RGB")


def _add(shared: Shared) -> Any:
    def add_photos(
        files: list[str] | None, draft: str | None, request: gr.Request
    ) -> dict[str, Any]:
        """Add photos of one subject to a new draft, or to the one whose id is given.

        Returns the draft's id, the names and captions of its photos, a sentence for every file
        that was not taken, and notes on what is worth a look.
        """
        found = shared.workspace(request).drafts.add(files or [], draft or None)
        return {
            "draft": found.id,
            "photos": [{"name": p.name, "caption": p.caption} for p in found.stored],
            "problems": found.problems,
            "notes": found.notes,
        }

    return said(add_photos)


def _added(shared: Shared) -> Any:
    def added(result: dict[str, Any], kept: Any, request: gr.Request) -> list[Any]:
        form = replace(restored(kept, shared.app.bases), draft=result["draft"])
        problems = listed("Not taken", result["problems"], alert=True)
        return [problems, *show(shared, shared.workspace(request), form)]

    return said(added)


def _chosen(shared: Shared) -> Any:
    def choose(draft: str, request: gr.Request, event: gr.SelectData) -> list[Any]:
        photos = shared.workspace(request).drafts.photos(draft)
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(photos):
            return [None, gr.update(visible=False), ""]
        photo = photos[index]
        box = gr.update(value=photo.caption, label=f"Caption of {photo.name}")
        return [index, gr.update(visible=True), box]

    return said(choose)


def _captioned(shared: Shared) -> Any:
    def caption(draft: str, index: int | None, text: str, request: gr.Request) -> None:
        if index is not None:
            shared.workspace(request).drafts.caption(draft, index, text)

    return said(caption)


def _described(shared: Shared) -> Any:
    def described(draft: str, index: int | None, text: str, request: gr.Request) -> Any:
        if index is None:
            return gr.skip()
        drafts = shared.workspace(request).drafts
        drafts.caption(draft, index, text)
        return _thumbnails(drafts.photos(draft))

    return said(described)


def _removed(shared: Shared) -> Any:
    def remove(kept: Any, draft: str, index: int | None, request: gr.Request) -> list[Any]:
        workspace = shared.workspace(request)
        workspace.drafts.remove(draft, -1 if index is None else index)
        return show(shared, workspace, restored(kept, shared.app.bases))

    return said(remove)


def _over(shared: Shared) -> Any:
    def over(kept: Any, draft: str, request: gr.Request) -> list[Any]:
        workspace = shared.workspace(request)
        workspace.drafts.delete(draft)
        form = replace(restored(kept, shared.app.bases), draft=None)
        return ["", *show(shared, workspace, form)]

    return said(over)
