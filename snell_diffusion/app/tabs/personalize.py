"""Personalize: a walkthrough from photos to a running training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from snell_diffusion.app.estimates import Estimate
from snell_diffusion.app.form import Form, preset_of, request_of, restored, typed
from snell_diffusion.app.personalize import command_of, estimates_of, prompt_of, start, yaml_of
from snell_diffusion.app.presets import EFFORTS, KINDS
from snell_diffusion.app.shared import HIDDEN, QUIET, Shared, said
from snell_diffusion.app.tabs.listed import listed
from snell_diffusion.app.tabs.personalize_fields import build_fields, differing, shown_values
from snell_diffusion.app.tabs.personalize_photos import build_photos, known_draft, show
from snell_diffusion.app.views.run import run_view
from snell_diffusion.app.workspace import Workspace
from snell_diffusion.errors import SnellaError

PHOTOS, SUBJECT, SETTINGS, RUN = 1, 2, 3, 4  # the steps
BASICS = ("subject", "name", "kind", "effort", "base", "steps", "seed")
WORLD = (
    "The built-in model is a toy: it knows cat, dog, duck, teapot, backpack, toy, car, robot, fox, "
    "panda, penguin, owl, fish, mushroom, cactus, sneaker, clock, vase, rocket, house, rabbit, "
    "frog, boot, candle, can, sunglasses, bowl, guitar, apple, monster. Take the nearest one."
)
KIND_OF_THING = "One or two English words for the kind of thing: cat, teapot; or of style: print."
KEY = "snella-personalize"  # not a secret: what is kept is of use in one's own workspace only
# In the browser, as nothing of the file needs the server again.
DOWNLOAD = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/plain"}));
    link.download = "%s";
    link.click();
    URL.revokeObjectURL(link.href);
    return [];
}"""


@dataclass(frozen=True)
class Parts:
    """The components that several events use.

    Attributes:
        kept: The form in the browser.
        basics: By name, see BASICS.
        fields: Of the advanced settings, by name.
        view: What `_view` fills, in its order.
        reset: Takes all changes back.
    """

    kept: gr.BrowserState
    basics: dict[str, Any]
    fields: dict[str, Any]
    view: list[Any]
    reset: gr.Button

    @property
    def later(self) -> list[Any]:
        """What `_later` fills."""
        return [*self.view, *self.fields.values()]

    @property
    def inputs(self) -> list[Any]:
        return [self.kept, *self.basics.values(), *self.fields.values()]


def build(shared: Shared) -> None:
    """Fill the tab."""
    kept = gr.BrowserState({}, storage_key=KEY, secret=KEY)
    run = gr.State(None)
    with gr.Walkthrough(selected=PHOTOS, elem_id="personalize-walkthrough") as steps:
        with gr.Step("Photos", id=PHOTOS):
            photos = build_photos(shared, kept)
        with gr.Step("Subject", id=SUBJECT):
            subject = _subject_step(steps)
        with gr.Step("Settings", id=SETTINGS):
            parts, begin = _settings_step(shared, steps, kept, subject)
        with gr.Step("Run", id=RUN):
            view = run_view(shared, run, "personalize-run")
            again = gr.Button("Start another training", elem_id="personalize-again")
    _go(photos.following, steps, SUBJECT)
    _go(again, steps, PHOTOS)
    subject.following.click(_checked(shared), parts.inputs, [steps, *parts.later], **HIDDEN)
    _connect(shared, parts)
    begin.click(_started(shared, parts), parts.inputs, [run, steps], **HIDDEN)
    found = [*photos.shown, *parts.basics.values(), run, steps]
    loaded = shared.page.load(_restored(shared), [kept], found, **QUIET)
    loaded.then(said(view.look), [run, view.seen], view.parts, **QUIET)
    loaded.then(_answered(shared, fields=True), parts.inputs, parts.later, **QUIET)


def _go(button: gr.Button, steps: gr.Walkthrough, step: int) -> None:
    button.click(lambda: gr.Walkthrough(selected=step), None, steps, **QUIET)


@dataclass(frozen=True)
class SubjectStep:
    """The components of the second step: answers by name, what is shown, the button."""

    basics: dict[str, Any]
    world: gr.Markdown
    example: gr.Textbox
    following: gr.Button


def _subject_step(steps: gr.Walkthrough) -> SubjectStep:
    kind = gr.Radio(
        [(f"{kind.label}: {kind.hint}", kind.id) for kind in KINDS.values()],
        value="object",
        label="What do the photos show?",
        elem_id="personalize-kind",
    )
    subject = gr.Textbox(
        label="What is it?",
        info=KIND_OF_THING,
        placeholder="cat",
        max_length=30,
        elem_id="personalize-class",
    )
    world = gr.Markdown(elem_id="personalize-world")
    name = gr.Textbox(
        label="A name for it (optional)",
        info="A word that will mean your subject in every prompt. The built-in models learn a new "
        "word best, written <mika>; larger ones take a rare one, such as sks. Empty: we choose.",
        max_length=40,
        elem_id="personalize-name",
    )
    example = gr.Textbox(
        label="This is how you will ask for it",
        interactive=False,
        elem_id="personalize-prompt",
    )
    with gr.Row():
        _go(gr.Button("Back", elem_id="personalize-back-2"), steps, PHOTOS)
        following = gr.Button("Next", variant="primary", elem_id="personalize-next-2")
    return SubjectStep({"subject": subject, "name": name, "kind": kind}, world, example, following)


def _settings_step(
    shared: Shared, steps: gr.Walkthrough, kept: gr.BrowserState, subject: SubjectStep
) -> tuple[Parts, gr.Button]:
    bases = shared.app.bases.all()
    effort = gr.Radio(
        [(effort.label, effort.id) for effort in EFFORTS.values()],
        value="balanced",
        label="How thorough?",
        elem_id="personalize-effort",
    )
    base = gr.Dropdown(
        [(base.label, base.id) for base in bases],
        value=bases[0].id,
        label="Which model learns it?",
        elem_id="personalize-base",
    )
    expected = gr.HTML(elem_id="personalize-expected")
    with gr.Accordion("Advanced settings", open=False, elem_id="personalize-advanced"):
        length, seed = _numbers(shared)
        changed = gr.HTML(elem_id="personalize-changed")
        reset = gr.Button("Undo all changes", size="sm", elem_id="personalize-reset")
        fields = build_fields()
    settings, command = _command_line()
    with gr.Row():
        _go(gr.Button("Back", elem_id="personalize-back-3"), steps, SUBJECT)
        begin = gr.Button("Start training", variant="primary", elem_id="personalize-start")
    answers = {**subject.basics, "effort": effort, "base": base, "steps": length, "seed": seed}
    basics = {name: answers[name] for name in BASICS}
    view = [kept, subject.world, subject.example, effort, expected, changed, settings, command]
    return Parts(kept, basics, fields, view, reset), begin


def _numbers(shared: Shared) -> tuple[gr.Number, gr.Number]:
    limits = shared.app.limits
    length = gr.Number(
        None,
        label="Training steps",
        info=f"1 to {limits.train_steps}; empty: as many as chosen above.",
        precision=0,
        minimum=1,
        maximum=limits.train_steps,
        elem_id="personalize-train-steps",
    )
    seed = gr.Number(
        0,
        label="Seed",
        info="The same seed, photos and settings give the same result.",
        precision=0,
        minimum=0,
        maximum=limits.seed,
        elem_id="personalize-seed",
    )
    return length, seed


def _command_line() -> tuple[gr.Code, gr.Code]:
    """The same training for the command line: shown, copied, downloaded."""
    with gr.Accordion("The same on the command line", open=False, elem_id="personalize-cli"):
        gr.Markdown(
            "Put the photos into a folder `photos` beside `settings.yaml`, then run the command in "
            "a checkout of this project: it does what **Start training** does."
        )
        shown: dict[str, Any] = {"interactive": False, "buttons": ["copy"], "wrap_lines": True}
        settings = gr.Code(
            language="yaml",
            label="settings.yaml",
            lines=12,
            max_lines=24,
            elem_id="personalize-yaml",
            **shown,
        )
        command = gr.Code(
            language="shell", label="Command", lines=1, elem_id="personalize-command", **shown
        )
        with gr.Row():
            for code, name in ((settings, "settings.yaml"), (command, "train.sh")):
                button = gr.Button(
                    f"Download {name}",
                    size="sm",
                    elem_id=f"personalize-download-{name.partition('.')[0]}",
                )
                button.click(None, [code], None, js=DOWNLOAD % name, **QUIET)
    return settings, command


def _connect(shared: Shared, parts: Parts) -> None:
    """Answers change what is shown; kind, effort, base and steps also the advanced settings."""
    basics = parts.basics
    # A pasted text is no input, and is seen when the box is left.
    words = [event for name in ("subject", "name") for event in _events(basics[name])]
    presets = [basics[name].input for name in ("kind", "effort", "base")]
    presets += _left(basics["steps"])
    quiet = {**QUIET, "trigger_mode": "always_last"}
    gr.on(words, _answered(shared), parts.inputs, parts.view, **quiet)
    gr.on(presets, _answered(shared, fields=True), parts.inputs, parts.later, **quiet)
    tuned = [event for field in parts.fields.values() for event in _left(field)]
    gr.on(
        [*_left(basics["seed"]), *tuned], _tuned(shared, parts), parts.inputs, parts.view, **quiet
    )
    parts.reset.click(
        _answered(shared, fields=True, reset=True), parts.inputs, parts.later, **quiet
    )


def _events(box: gr.Textbox) -> list[Any]:
    return [box.input, *_left(box)]


def _left(field: Any) -> list[Any]:
    """Events of a component whose value is complete: a number is not while it is being typed."""
    return [field.submit, field.blur] if hasattr(field, "submit") else [field.input]


def _form(shared: Shared, kept: Any, values: Sequence[Any]) -> Form:
    named = dict(zip(BASICS, values, strict=False))
    return typed(restored(kept, shared.app.bases), named)


def _answered(shared: Shared, *, fields: bool = False, reset: bool = False) -> Any:
    def answered(request: gr.Request, kept: Any, *values: Any) -> list[Any]:
        form = _form(shared, kept, values)
        if reset:
            form = replace(form, overrides={}, steps=None)
        workspace = shared.workspace(request)
        return (_later if fields else _view)(shared, workspace, form)

    return said(answered)


def _overridden(
    shared: Shared, workspace: Workspace, parts: Parts, form: Form, values: Any
) -> Form:
    """The form with what its advanced boxes hold now."""
    held = dict(zip(parts.fields, values[len(BASICS) :], strict=True))
    preset = preset_of(workspace, form, shared.app.bases)
    return replace(form, overrides=differing(held, preset))


def _tuned(shared: Shared, parts: Parts) -> Any:
    def tuned(request: gr.Request, kept: Any, *values: Any) -> list[Any]:
        workspace = shared.workspace(request)
        form = _overridden(shared, workspace, parts, _form(shared, kept, values), values)
        return _view(shared, workspace, form)

    return said(tuned)


def _checked(shared: Shared) -> Any:
    def checked(request: gr.Request, kept: Any, *values: Any) -> list[Any]:
        form = _form(shared, kept, values)
        request_of(form, shared.app.bases)
        shown = _later(shared, shared.workspace(request), form)
        return [gr.Walkthrough(selected=SETTINGS), *shown]

    return said(checked)


def _started(shared: Shared, parts: Parts) -> Any:
    def begin(request: gr.Request, kept: Any, *values: Any) -> list[Any]:
        workspace = shared.workspace(request)
        form = _overridden(shared, workspace, parts, _form(shared, kept, values), values)
        job = start(shared.app, workspace, request_of(form, shared.app.bases))
        return [job, gr.Walkthrough(selected=RUN)]

    return said(begin)


def _restored(shared: Shared) -> Any:
    def load(kept: Any, request: gr.Request) -> list[Any]:
        workspace = shared.workspace(request)
        form = restored(kept, shared.app.bases)
        form = replace(form, draft=known_draft(workspace, form))
        run = workspace.jobs.active()
        step = gr.Walkthrough(selected=PHOTOS if run is None else RUN)
        # Where nothing was kept, the boxes are left alone: someone may be typing already.
        basics = [getattr(form, name) if kept else gr.skip() for name in BASICS]
        return [*show(shared, workspace, form), *basics, run, step]

    return said(load)


def _later(shared: Shared, workspace: Workspace, form: Form) -> list[Any]:
    """What `Parts.later` shows of a form: the view and the advanced settings."""
    preset = preset_of(workspace, form, shared.app.bases)
    return [*_view(shared, workspace, form), *shown_values({**preset, **form.overrides})]


def _view(shared: Shared, workspace: Workspace, form: Form) -> list[Any]:
    """What `Parts.view` shows of a form."""
    base = shared.app.bases.get(form.base)
    estimates = estimates_of(
        shared.app, workspace, base, form.kind, {**form.overrides, **_steps(form)}
    )
    try:
        request = request_of(form, shared.app.bases)
        settings = yaml_of(workspace, request, base, exposed=shared.app.exposed)
        command, example = command_of(), prompt_of(request, base)
    except SnellaError as error:
        settings, command, example = f"# Not complete yet: {error}\n", "", ""
    return [
        form.stored(),
        WORLD if base.shipped else "",
        example,
        gr.update(choices=_efforts(estimates)),
        _expected(estimates[form.effort]),
        listed("Changed by you", [f"{k}: {v}" for k, v in form.overrides.items()]),
        settings,
        command,
    ]


def _steps(form: Form) -> dict[str, int]:
    return {} if form.steps is None else {"max_train_steps": form.steps}


def _expected(expected: Estimate) -> str:
    return f"<p><strong>Expected:</strong> {expected.sentence()} of memory ({expected.basis}).</p>"


def _efforts(estimates: dict[str, Estimate]) -> list[tuple[str, str]]:
    return [
        (f"{effort.label} ({estimates[effort.id].sentence()}): {effort.hint}", effort.id)
        for effort in EFFORTS.values()
    ]
