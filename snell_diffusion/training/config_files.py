"""Reads a flat record of settings from YAML and the command line (which wins)."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from transformers import HfArgumentParser

from snell_diffusion.errors import SnellaConfigError

_LONGEST = 80  # characters of a bad value that a message quotes


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SnellaConfigError(f"command line: {message}")


@dataclass(frozen=True)
class Settings:
    """How the settings of one trainer are read.

    Attributes:
        record: The dataclass that holds them, checked by pydantic on creation.
        description: What `--help` says first.
        aliases: Other names of settings.
        prepare: Turns values as they were given into values of the record, e.g. reads a file that
            one of them names.
        nested: Keys of records inside the record, for the nearest name of an unknown one.
    """

    record: type
    description: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values
    nested: Sequence[str] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of all settings, in their order."""
        return tuple(f.name for f in dataclasses.fields(self.record))

    def parser(self) -> argparse.ArgumentParser:
        """The command line; only flags that are given end up in the namespace."""
        parser = _Parser(
            self.record,  # type: ignore[arg-type]
            allow_abbrev=False,
            description=self.description,
            formatter_class=argparse.HelpFormatter,
        )
        for action in parser._actions:
            action.default = argparse.SUPPRESS
            action.help = (action.help or "").replace("%", "%%")
        parser.add_argument("--config", help="YAML file with any of these keys; flags win over it.")
        return parser

    def parse(self, arguments: Sequence[str], parser: argparse.ArgumentParser | None = None) -> Any:
        """Build the record from command-line arguments and the YAML file that --config names.

        Raises:
            SnellaConfigError: Unknown key or flag (the nearest is named), bad value, unreadable
                file.
        """
        namespace, unknown = (parser or self.parser()).parse_known_args(list(arguments))
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = self._nearest(flag.lstrip("-").replace("-", "_"), prefix="--")
            raise SnellaConfigError(f"command line: unknown argument '{flag}'{near}")
        given = vars(namespace)
        path = given.pop("config", None)
        values = {} if path is None else read_mapping(Path(path))
        return self.make({**values, **given}, where=path or "command line")

    def make(self, values: Mapping[str, Any], where: str = "config") -> Any:
        """Build the record from plain values; `where` names their source in error messages.

        Raises:
            SnellaConfigError: Unknown keys or bad values, all of them in one message.
        """
        values = {self.aliases.get(key, key): value for key, value in values.items()}
        unknown = [key for key in values if key not in self.keys]
        if unknown:
            lines = [f"unknown key '{key}'{self._nearest(key)}" for key in unknown]
            raise SnellaConfigError(f"{where}: " + "; ".join(lines))
        values = self.prepare(values)
        try:
            return self.record(**values)
        except ValidationError as error:
            raise SnellaConfigError(f"{where}: " + "; ".join(self._readable(error))) from error

    def _readable(self, error: ValidationError) -> Iterable[str]:
        for issue in error.errors():
            name = ".".join(map(str, issue["loc"]))
            if issue["type"] == "unexpected_keyword_argument":
                key = str(issue["loc"][-1])
                near = self._nearest(key, keys=self.nested or self.keys)
                yield f"unknown key '{name}'{near}"
                continue
            message = issue["msg"].removeprefix("Value error, ").replace("Input should", "should")
            yield f"{name} {message}, got {_short(issue['input'])}" if name else message

    def _nearest(self, key: str, prefix: str = "", keys: Sequence[str] = ()) -> str:
        known = keys or [*self.keys, *self.aliases, "config"]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return f", did you mean '{prefix}{near[0]}'?" if near else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings.

    Raises:
        SnellaConfigError: The file is missing, is not YAML, or holds no mapping.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise SnellaConfigError(f"config file {path} should hold 'key: value' lines")
    return values


def read_yaml(path: Path) -> Any:
    """What a YAML or JSON file holds.

    Raises:
        SnellaConfigError: The file is missing or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise SnellaConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SnellaConfigError(f"config file {path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise SnellaConfigError(f"config file {path} is not valid YAML: {error}") from error


def yaml_text(values: Mapping[str, Any]) -> str:
    """Settings as YAML that `--config` reads back."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
