"""The controls that decide a picture, as the Generate and the Compare tab both have them."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from snell_diffusion.app.bases import Base
from snell_diffusion.app.library import Adapter
from snell_diffusion.app.shared import QUIET, Shared, said
from snell_diffusion.app.workspace import Workspace

NOTHING = ""  # what a list of adapters holds while none is chosen
SCENE = "a photo of a red teapot on the beach"
FIELDS = ("base", "prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height")


def nothing() -> None:
    """No control."""


class Form:
    """Base, prompt, seed, size and adapters; made inside of the layout where it is to stand.

    Args:
        shared: The page.
        prefix: Of the ids of its elements.
        slots: How many adapters can be chosen.
        lockable: Whether the seed can be unlocked, to be another one each time.
        below_adapters, below_prompt, above_details: Make the tab's own controls at these places.
    """

    def __init__(
        self,
        shared: Shared,
        prefix: str,
        slots: int,
        lockable: bool = True,
        below_adapters: Callable[[], None] = nothing,
        below_prompt: Callable[[], None] = nothing,
        above_details: Callable[[], None] = nothing,
    ) -> None:
        self.shared = shared
        self.prefix = prefix
        base = shared.app.bases.all()[0]
        self._suggested = gr.State(SCENE)
        self.base = gr.Dropdown(
            [(known.label, known.id) for known in shared.app.bases.all()],
            value=base.id,
            label="Base model",
            elem_id=f"{prefix}-base",
            visible=len(shared.app.bases.all()) > 1,
        )
        self._adapter_slots(slots)
        below_adapters()
        self._words()
        below_prompt()
        self._seed_row(lockable)
        above_details()
        with gr.Accordion("More settings: steps, guidance, size, what to keep out", open=False):
            self._details(base)
        self._connect()

    @property
    def inputs(self) -> list[Any]:
        """What `values` takes, in order."""
        plain = [self.base, self.prompt, self.negative, self.seed]
        sizes = [self.steps, self.guidance, self.width, self.height]
        return [*plain, *sizes, *self.adapters, *self.strengths]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """Fields of a `DrawRequest` from the values of `inputs`."""
        plain, rest = given[: len(FIELDS)], given[len(FIELDS) :]
        chosen, strengths = rest[: len(self.adapters)], rest[len(self.adapters) :]
        worn = [pair for pair in zip(chosen, strengths, strict=True) if pair[0]]
        return {**dict(zip(FIELDS, plain, strict=True)), "adapters": worn}

    def _adapter_slots(self, slots: int) -> None:
        self.adapters, self.strengths, self._rows = [], [], []
        for number in range(1, slots + 1):
            with gr.Row(visible=number == 1, equal_height=True) as row:
                self.adapters.append(
                    gr.Dropdown(
                        [("No adapter", NOTHING)],
                        value=NOTHING,
                        label="Adapter" if number == 1 else f"Adapter {number}",
                        info="What was trained in the Personalize tab, or uploaded."
                        if number == 1
                        else "Works together with those above.",
                        elem_id=f"{self.prefix}-adapter-{number}",
                        min_width=220,
                        scale=3,
                    )
                )
                self.strengths.append(
                    gr.Slider(
                        0,
                        self.shared.app.limits.strength,
                        1,
                        step=0.05,
                        label="Strength (1 is as trained)",
                        elem_id=f"{self.prefix}-strength-{number}",
                        min_width=180,
                        scale=2,
                    )
                )
            self._rows.append(row)

    def _words(self) -> None:
        self.prompt = gr.Textbox(
            SCENE,
            label="Prompt",
            info="What to draw. Name your subject as in training, such as: a sks cat in the snow.",
            lines=2,
            max_length=self.shared.app.limits.prompt,
            elem_id=f"{self.prefix}-prompt",
        )

    def _seed_row(self, lockable: bool) -> None:
        with gr.Row(equal_height=lockable):  # a button alone would grow as high as the box
            self.seed = gr.Number(
                0,
                label="Seed",
                info="The same seed and settings give the same picture.",
                precision=0,
                minimum=0,
                maximum=self.shared.app.limits.seed,
                elem_id=f"{self.prefix}-seed",
                min_width=140,
            )
            with gr.Column(min_width=140):
                self.lock = gr.Checkbox(
                    True,
                    label="Lock: keep this seed",
                    visible=lockable,
                    elem_id=f"{self.prefix}-lock",
                )
                self.shuffle = gr.Button("Shuffle", size="sm", elem_id=f"{self.prefix}-shuffle")

    def _details(self, base: Base) -> None:
        limits, name = self.shared.app.limits, self.prefix
        self.negative = gr.Textbox(
            "",
            label="Negative prompt",
            info="What to keep out of the picture; may be empty.",
            max_length=limits.prompt,
            interactive=base.takes_negative,
            elem_id=f"{name}-negative",
        )
        self.steps = gr.Slider(
            1,
            limits.draw_steps,
            base.steps,
            step=1,
            label="Steps",
            info="More steps take longer and show more detail.",
            elem_id=f"{name}-steps",
        )
        self.guidance = gr.Slider(
            0,
            limits.guidance,
            base.guidance,
            step=0.1,
            label="Guidance",
            info="How closely to follow the prompt; 1 is off.",
            elem_id=f"{name}-guidance",
        )
        self.width, self.height = (
            gr.Slider(
                base.min_side,
                base.max_side,
                base.resolution,
                step=base.multiple,
                label=f"{side} in pixels",
                elem_id=f"{name}-{side.lower()}",
            )
            for side in ("Width", "Height")
        )

    def _connect(self) -> None:
        self.base.change(
            said(self._settings_of),
            [self.base],
            [self.steps, self.guidance, self.width, self.height, self.negative],
            **QUIET,
        )
        self.shuffle.click(self.any_seed, outputs=[self.seed], **QUIET)
        self.adapters[0].change(
            said(self._chosen),
            [self.adapters[0], self.base, self.prompt, self._suggested],
            [self.base, self.prompt, self._suggested],
            **QUIET,
        )
        for chosen, below in zip(self.adapters, self._rows[1:], strict=False):
            # A row that is in use stays, whatever happens above it.
            chosen.change(
                lambda name: gr.update(visible=True) if name else gr.skip(),
                [chosen],
                [below],
                **QUIET,
            )
        self.shared.on_show(self.prefix, self.refreshed, self.adapters, self.adapters)

    def any_seed(self) -> int:
        """A seed at random."""
        return secrets.randbelow(self.shared.app.limits.seed + 1)

    def refreshed(self, request: gr.Request, *chosen: str | None) -> Any:
        """Updates of all lists of adapters; what was chosen stays if it is still there."""
        choices = choices_of(self.shared.workspace(request))
        known = {name for _, name in choices}
        # A list that keeps its choice is told no value: another event may be choosing just now.
        updates = [
            gr.update(choices=choices, **({} if name in known else {"value": NOTHING}))
            for name in chosen
        ]
        return updates[0] if len(updates) == 1 else updates

    def select(self, request: gr.Request, wanted: str | None) -> Any:
        """Update of the first list of adapters, with one of them chosen."""
        choices = choices_of(self.shared.workspace(request))
        if wanted not in {name for _, name in choices}:
            return gr.skip()
        return gr.update(choices=choices, value=wanted)

    def _settings_of(self, name: str) -> list[Any]:
        base = self.shared.app.bases.get(name)
        side = gr.update(
            minimum=base.min_side,
            maximum=base.max_side,
            step=base.multiple,
            value=base.resolution,
        )
        negative = gr.update(interactive=base.takes_negative)
        if not base.takes_negative:
            negative = gr.update(interactive=False, value="")
        return [base.steps, base.guidance, side, dict(side), negative]

    def _chosen(
        self, request: gr.Request, name: str | None, base: str, prompt: str, suggested: str
    ) -> Any:
        """Go to the adapter's base, and suggest its prompt where none was written."""
        if not name:
            return gr.skip(), gr.skip(), gr.skip()
        adapter = self.shared.workspace(request).library.get(name)
        moved = adapter.base_id if adapter.base_id not in (None, base) else gr.skip()
        if not adapter.prompt or prompt.strip() not in ("", suggested):
            return moved, gr.skip(), gr.skip()
        return moved, adapter.prompt, adapter.prompt


def choices_of(workspace: Workspace) -> list[tuple[str, str]]:
    """(what to show, id) of all adapters of a workspace, and of none."""
    return [("No adapter", NOTHING), *((_shown(a), a.id) for a in workspace.library.all())]


def _shown(adapter: Adapter) -> str:
    return adapter.label if adapter.base_id else f"{adapter.label}, for a base not offered here"
