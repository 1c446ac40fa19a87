"""Read a TrainConfig from YAML and the command line (which wins), and write it back."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snell_diffusion.diffusion.concepts import ConceptConfig
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.config_files import Settings, read_mapping, read_yaml, yaml_text

ALIASES = {"base": "pretrained_model_name_or_path", "concepts_list": "concepts"}
KEYS = tuple(f.name for f in dataclasses.fields(TrainConfig))
CONCEPT_KEYS = tuple(f.name for f in dataclasses.fields(ConceptConfig))


def make_parser() -> argparse.ArgumentParser:
    """The command line of TrainConfig; only flags that are given end up in the namespace."""
    parser = _SETTINGS.parser()
    for action in parser._actions:
        if action.dest == "concepts":
            action.type, action.nargs, action.metavar = str, None, "FILE"
    parser.add_argument(
        "--base", dest=ALIASES["base"], default=argparse.SUPPRESS, help="Short for the base model."
    )
    parser.add_argument(
        "--concepts_list",
        dest="concepts",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="The same as --concepts.",
    )
    return parser


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """Build the config from command-line arguments and the YAML file that --config names.

    Raises:
        SnellaConfigError: Unknown key or flag (the nearest is named), bad value, unreadable file.
    """
    return _SETTINGS.parse(arguments, make_parser())


def make_config(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Build a TrainConfig from plain values; `where` names their source in error messages.

    Raises:
        SnellaConfigError: Unknown keys or bad values, all of them in one message.
    """
    return _SETTINGS.make(values, where)


def _read_named(values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("concepts"), str):
        return {**values, "concepts": read_concepts(Path(values["concepts"]))}
    return values


_SETTINGS = Settings(
    TrainConfig,
    "Personalize a text-to-image model from a few photos with SNELLA.",
    aliases=ALIASES,
    prepare=_read_named,
    nested=CONCEPT_KEYS,
)


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings.

    Raises:
        SnellaConfigError: The file is missing, is not YAML, or holds no mapping.
    """
    return read_mapping(path)


def read_concepts(path: Path) -> list[Any]:
    """Read the list of concepts from a JSON or YAML file.

    Raises:
        SnellaConfigError: The file is missing, is neither, or holds no list.
    """
    values = read_yaml(path)
    if not isinstance(values, list):
        raise SnellaConfigError(f"config file {path} should hold a list of concepts")
    return values


def config_values(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values, every key resolved, grouped as in GROUPS."""
    values = {name: getattr(config, name) for name in KEYS}
    return {**values, "concepts": [_given(concept) for concept in config.concepts]}


def _given(concept: ConceptConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(concept).items() if value is not None}


def config_text(config: TrainConfig) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    return yaml_text(config_values(config))
