"""Configs of the shipped models tell nothing of the machine they were made on."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest

from scripts.embedded_base.export import assemble_dit, export
from scripts.embedded_base.flow import build_transformer
from snell_diffusion.models import SHIPPED_BASES, embedded_path


def texts(value: Any) -> Iterator[str]:
    """Every string in a parsed JSON file, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def absolute_paths(folder: Path) -> dict[str, list[str]]:
    """Files of a model that hold absolute paths, with these; a vocabulary holds words alone."""
    found = {}
    for path in folder.rglob("*.json"):
        if path.name != "tokenizer.json":
            paths = [
                text
                for text in texts(json.loads(path.read_text("utf-8")))
                if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
            ]
            found |= {str(path.relative_to(folder)): paths} if paths else {}
    return found


@pytest.mark.parametrize("name", SHIPPED_BASES)
def test_no_shipped_config_holds_an_absolute_path(name: str) -> None:
    assert absolute_paths(embedded_path(name)) == {}


def test_an_export_drops_the_folder_that_a_part_was_loaded_from(tmp_path: Path) -> None:
    trained = {f"transformer.{k}": v for k, v in build_transformer().state_dict().items()}
    pipeline = assemble_dit(embedded_path(), trained)
    pipeline.save_pretrained(tmp_path / "plain")
    assert absolute_paths(tmp_path / "plain") == {
        "vae/config.json": [str(embedded_path() / "vae")],
    }
    export(pipeline, tmp_path / "exported")
    assert absolute_paths(tmp_path / "exported") == {}
