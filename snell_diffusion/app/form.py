"""What the personalize form holds, as plain values: kept in the browser, turned into a request."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from snell_diffusion.app.bases import Base, Bases
from snell_diffusion.app.fields import FIELDS
from snell_diffusion.app.personalize import TrainRequest, make_request, settings_of
from snell_diffusion.app.presets import (
    EFFORTS,
    HELD_OUT_FROM,
    KINDS,
    preset_values,
    recipe_of,
)
from snell_diffusion.app.workspace import Workspace
from snell_diffusion.errors import SnellaError, SnellaValueError


@dataclass(frozen=True)
class Form:
    """The visitor's answers so far.

    Attributes:
        draft: Id of the photos, None before any.
        subject: What it is, as typed.
        name: What it is called, as typed.
        kind, effort, base: Ids.
        steps: In place of the effort's; None: the effort's.
        seed: Of everything random.
        overrides: Settings that differ from the preset's.
    """

    draft: str | None = None
    subject: str = ""
    name: str = ""
    kind: str = "object"
    effort: str = "balanced"
    base: str = ""
    steps: int | None = None
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """As the browser keeps it."""
        return asdict(self)


def restored(value: Any, bases: Bases) -> Form:
    """The form from what a browser kept; what no longer fits is left at its default."""
    form = Form(base=bases.all()[0].id)
    if not isinstance(value, Mapping):
        return form
    known = {
        "draft": lambda v: v is None or isinstance(v, str),
        "subject": lambda v: isinstance(v, str),
        "name": lambda v: isinstance(v, str),
        "kind": lambda v: v in KINDS,
        "effort": lambda v: v in EFFORTS,
        "base": lambda v: v in {base.id for base in bases.all()},
        "steps": lambda v: v is None or type(v) is int,
        "seed": lambda v: type(v) is int,
    }
    kept = {
        key: value[key] for key, fits in known.items() if key in value and _fits(fits, value[key])
    }
    return replace(form, **kept, overrides=_overrides(value.get("overrides")))


def _fits(fits: Any, value: Any) -> bool:
    try:
        return bool(fits(value))
    except TypeError:  # a list or a table is in no set
        return False


def _overrides(given: Any) -> dict[str, Any]:
    kept = {}
    for name, value in given.items() if isinstance(given, Mapping) else ():
        try:
            kept[name] = FIELDS[name].check(value)
        except (KeyError, SnellaValueError):  # of another version of the page
            continue
    return kept


def as_word(name: str, base: Base) -> str | None:
    """A name as the word that prompts use: Mika -> <mika> where the base wants a new word.

    Args:
        name: As typed; empty leaves the choice to the base.
        base: What is trained.
    """
    word = re.sub(r"[\s_]+", "-", name.strip().lower())
    if not word:
        return None
    return f"<{word}>" if recipe_of(base).new_word and not word.startswith("<") else word


def request_of(form: Form, bases: Bases) -> TrainRequest:
    """The form as a checked request.

    Raises:
        SnellaValueError: What is missing or wrong, as sentences.
    """
    base = bases.get(form.base)
    return make_request(
        draft=form.draft,
        subject=form.subject,
        word=as_word(form.name, base),
        preset=form.kind,
        effort=form.effort,
        base=form.base,
        steps=form.steps,
        seed=form.seed,
        overrides=form.overrides,
    )


def typed(form: Form, basics: Mapping[str, Any]) -> Form:
    """The form with what its boxes hold now; a box that was emptied counts as untouched.

    Args:
        form: Before.
        basics: Values by name of subject, name, kind, effort, base, steps and seed.
    """
    given = {key: value for key, value in basics.items() if value is not None}
    return replace(form, **{"steps": None, "seed": 0, **given})


def preset_of(workspace: Workspace, form: Form, bases: Bases) -> dict[str, Any]:
    """The settings without any change of the visitor; without prompts while words are missing."""
    base = bases.get(form.base)
    try:
        request = request_of(replace(form, overrides={}), bases)
        return settings_of(workspace, request, base)
    except SnellaError:
        return preset_values(base, form.kind, form.effort, HELD_OUT_FROM, form.steps)
