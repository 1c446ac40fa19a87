"""Read a TrainConfig from YAML and the command line (which wins), and write it back."""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from transformers import HfArgumentParser

from snell_diffusion.diffusion.concepts import ConceptConfig
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.errors import SnellaConfigError

ALIASES = {"base": "pretrained_model_name_or_path", "concepts_list": "concepts"}
_LONGEST = 80  # characters of a bad value that a message quotes
KEYS = tuple(f.name for f in dataclasses.fields(TrainConfig))
CONCEPT_KEYS = tuple(f.name for f in dataclasses.fields(ConceptConfig))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SnellaConfigError(f"command line: {message}")


def make_parser() -> argparse.ArgumentParser:
    """The command line of TrainConfig; only flags that are given end up in the namespace."""
    parser = _Parser(
        TrainConfig,  # type: ignore[arg-type]
        allow_abbrev=False,
        description="Personalize a text-to-image model from a few photos with SNELLA.",
        formatter_class=argparse.HelpFormatter,
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.help = (action.help or "").replace("%", "%%")
        if action.dest == "concepts":
            action.type, action.nargs, action.metavar = str, None, "FILE"
    parser.add_argument("--config", help="YAML file with any of these keys; flags win over it.")
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
    namespace, unknown = make_parser().parse_known_args(list(arguments))
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise SnellaConfigError(
            f"command line: unknown argument '{flag}'"
            f"{_nearest(flag.lstrip('-').replace('-', '_'), prefix='--')}"
        )
    given = vars(namespace)
    path = given.pop("config", None)
    values = {} if path is None else read_config(Path(path))
    return make_config({**values, **given}, where=path or "command line")


def make_config(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Build a TrainConfig from plain values; `where` names their source in error messages.

    Raises:
        SnellaConfigError: Unknown keys or bad values, all of them in one message.
    """
    values = {ALIASES.get(key, key): value for key, value in values.items()}
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        lines = [f"unknown key '{key}'{_nearest(key)}" for key in unknown]
        raise SnellaConfigError(f"{where}: " + "; ".join(lines))
    if isinstance(values.get("concepts"), str):
        values["concepts"] = read_concepts(Path(values["concepts"]))
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise SnellaConfigError(f"{where}: " + "; ".join(_readable(error))) from error


def _readable(error: ValidationError) -> Iterable[str]:
    for issue in error.errors():
        name = ".".join(map(str, issue["loc"]))
        if issue["type"] == "unexpected_keyword_argument":
            yield f"unknown key '{name}'{_nearest(str(issue['loc'][-1]), keys=CONCEPT_KEYS)}"
            continue
        message = issue["msg"].removeprefix("Value error, ").replace("Input should", "should")
        yield f"{name} {message}, got {_short(issue['input'])}" if name else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _nearest(key: str, prefix: str = "", keys: Sequence[str] = ()) -> str:
    known = keys or [*KEYS, *ALIASES, "config"]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f", did you mean '{prefix}{near[0]}'?" if near else ""


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings.

    Raises:
        SnellaConfigError: The file is missing, is not YAML, or holds no mapping.
    """
    values = _read_yaml(path)
    if not isinstance(values, dict):
        raise SnellaConfigError(f"config file {path} should hold 'key: value' lines")
    return values


def read_concepts(path: Path) -> list[Any]:
    """Read the list of concepts from a JSON or YAML file.

    Raises:
        SnellaConfigError: The file is missing, is neither, or holds no list.
    """
    values = _read_yaml(path)
    if not isinstance(values, list):
        raise SnellaConfigError(f"config file {path} should hold a list of concepts")
    return values


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise SnellaConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SnellaConfigError(f"config file {path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise SnellaConfigError(f"config file {path} is not valid YAML: {error}") from error


def config_values(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values, every key resolved, grouped as in GROUPS."""
    values = {name: getattr(config, name) for name in KEYS}
    return {**values, "concepts": [_given(concept) for concept in config.concepts]}


def _given(concept: ConceptConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(concept).items() if value is not None}


def config_text(config: TrainConfig) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    return yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True)
