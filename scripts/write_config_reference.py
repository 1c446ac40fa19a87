"""Write docs/configuration.md from the configuration classes."""

import dataclasses
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from snell_diffusion import SnellaConfig
from snell_diffusion.diffusion.concepts import ConceptConfig
from snell_diffusion.diffusion.config_groups import GROUPS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
NAMES = {
    "str": "text",
    "float": "number",
    "int": "whole number",
    "bool": "yes or no",
    "ConceptConfig": "concept",
}
HEAD = """# Configuration reference

Written by `scripts/write_config_reference.py` from the configuration classes; a test fails when the
two differ (`make docs` brings this page up to date).

# Training: `train_dreambooth_snella.py`

Every key can stand in a YAML file (`--config run.yaml`) and on the command line, where it wins:
`--max_train_steps 300`. Unknown keys are errors that name the nearest key. The resolved
configuration is saved as `config.yaml` in the run folder and can be given to `--config` again. A
key without a default here is off, or the method chooses.
"""
SNELLA_HEAD = """
# The method: `SnellaConfig`

For `peft.get_peft_model` and `model.add_adapter`. `SnellaConfig.paper()` has the public code's
values, which are the defaults; `SnellaConfig.diffusion()` differs where the third column says so.

| field | paper | diffusion | meaning |
|---|---|---|---|"""


def type_name(kind: Any) -> str:
    """A type as a reader writes it: `whole number`, `no` or `bf16`, `list of text`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, UnionType):
        return " or ".join(type_name(a) for a in arguments if a is not NoneType)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    return NAMES[kind.__name__]


def value_text(value: Any) -> str:
    """A value as it stands in YAML; empty for nothing."""
    if value in (None, [], ""):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a (pydantic or plain) dataclass field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return getattr(field.default, "default", field.default)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def training_tables() -> list[str]:
    """One table per group of training settings, and one for a concept."""
    lines = []
    for group in (*GROUPS, ConceptConfig):
        lines += ["", f"## {(group.__doc__ or group.__name__).strip().rstrip('.')}", ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        hints = typing.get_type_hints(group, include_extras=True)
        lines += [
            row(
                f"`{field.name}`",
                type_name(hints[field.name]),
                value_text(default_of(field)),
                field.metadata["help"],
            )
            for field in dataclasses.fields(group)
        ]
    return lines


def method_rows() -> list[str]:
    """Fields of SnellaConfig, without those that PEFT adds to every method."""
    paper, ours = SnellaConfig.paper(), SnellaConfig.diffusion()
    described = [f for f in dataclasses.fields(SnellaConfig) if "help" in f.metadata]
    own = {name for kind in SnellaConfig.__mro__[:2] for name in kind.__annotations__}
    rows = []
    for field in (f for f in described if f.name in own):
        before, after = getattr(paper, field.name), getattr(ours, field.name)
        changed = value_text(after) if after != before else ""
        rows.append(row(f"`{field.name}`", value_text(before), changed, field.metadata["help"]))
    return rows


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD.rstrip(), *training_tables(), SNELLA_HEAD, *method_rows()]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), "utf-8")
    print(TARGET)
