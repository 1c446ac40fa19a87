"""The advanced settings of a training as form components, generated from their descriptions."""

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import gradio as gr

from snell_diffusion.app.fields import FIELDS, MAX_ITEMS, MAX_TEXT, Field
from snell_diffusion.errors import SnellaValueError

_OPEN = "as usual"  # choice that leaves an optional setting to its default


def build_fields() -> dict[str, Any]:
    """One component per field, in a closed accordion per group; by name of the setting."""
    components = {}
    for title, fields in groupby(FIELDS.values(), lambda field: field.group):
        with gr.Accordion(title, open=False):
            for field in fields:
                components[field.name] = _component(field)
    return components


def _component(field: Field) -> Any:
    shared: dict[str, Any] = {
        "label": field.label,
        "info": f"{field.help} (Setting: {field.name})",
        "elem_id": f"personalize-field-{field.name.replace('_', '-')}",
    }
    if field.kind == "flag" and not field.optional:
        return gr.Checkbox(field.default, **shared)
    if field.kind in ("flag", "choice"):
        return gr.Dropdown(_choices(field), value=to_component(field, field.default), **shared)
    if field.kind in ("whole", "number"):
        return gr.Number(
            field.default,
            precision=0 if field.kind == "whole" else None,
            minimum=None if math.isinf(field.low) else field.low,
            maximum=None if math.isinf(field.high) else field.high,
            **shared,
        )
    lines = 3 if field.kind == "list" else 1
    longest = MAX_TEXT * (MAX_ITEMS if field.kind == "list" else 1)
    value = to_component(field, field.default)
    return gr.Textbox(value, lines=lines, max_length=longest, **shared)


def _choices(field: Field) -> list[str]:
    choices = ["on", "off"] if field.kind == "flag" else list(field.choices)
    return [_OPEN, *choices] if field.optional else choices


def to_component(field: Field, value: Any) -> Any:
    """A setting's value as its component shows it."""
    if field.kind == "flag" and field.optional:
        return {None: _OPEN, True: "on", False: "off"}[value]
    if field.kind == "choice":
        return _OPEN if value is None else value
    if field.kind == "list":
        return "\n".join(value)
    return "" if value is None and field.kind == "text" else value


def from_component(field: Field, value: Any) -> Any:
    """What a component holds, as the setting's checked value.

    Raises:
        SnellaValueError: It is out of range.
    """
    if field.kind == "list":
        value = [line.strip() for line in str(value or "").splitlines() if line.strip()]
    elif value in (_OPEN, "", None):
        value = None
    elif field.kind == "flag" and field.optional:
        value = {"on": True, "off": False}.get(value, value)
    if value is None and not field.optional:
        raise SnellaValueError(f"{field.name} is empty: fill it in")
    return field.check(value)


def differing(values: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the preset's, or from the default where it has none.

    Args:
        values: What the components hold, by name.
        preset: The settings without changes.

    Raises:
        SnellaValueError: A value is out of range.
    """
    found = {}
    for name, value in values.items():
        field = FIELDS[name]
        setting = from_component(field, value)
        if setting != preset.get(name, field.default):
            found[name] = setting
    return found


def shown_values(settings: Mapping[str, Any]) -> list[Any]:
    """What all components show for some settings, in the order of the fields."""
    return [
        to_component(field, settings.get(field.name, field.default)) for field in FIELDS.values()
    ]
