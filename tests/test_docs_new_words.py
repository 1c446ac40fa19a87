"""The page on new words: its command trains and its example draws."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from snell_diffusion.diffusion.config_files import make_config, parse_config
from snell_diffusion.diffusion.training import run
from tests.diffusion.training_runs import write_photos
from tests.test_docs import ROOT, python_examples

PAGE = ROOT / "docs" / "new_words.md"


def commands() -> list[str]:
    return [block.split("```")[0] for block in PAGE.read_text("utf-8").split("\n```\n")[1:]]


def test_the_command_and_the_example_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 1)
    command = next(text for text in commands() if "--new_tokens" in text)
    arguments = shlex.split(command.replace("\\\n", " "))
    settings = parse_config(arguments[arguments.index("train_dreambooth_snella.py") + 1 :])
    assert settings.max_train_steps == 300
    run(replace(settings, max_train_steps=1, train_batch_size=1, rank=2, target_modules=["to_q"]))
    [example] = python_examples(PAGE)
    exec(compile(example, str(PAGE), "exec"), {})
    assert (tmp_path / "pack.png").stat().st_size > 1000


def test_the_yaml_is_a_config() -> None:
    import yaml

    text = PAGE.read_text("utf-8").split("```yaml\n")[1].split("```")[0]
    given = {"instance_data_dir": "x", "instance_prompt": "y"}
    assert make_config({**given, **yaml.safe_load(text)}).early_stopping_patience == 4
