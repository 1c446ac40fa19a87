"""One record of settings: protocols, files, command line, refusals."""

from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.vision.config import (
    PROTOCOLS,
    SETTINGS,
    config_text,
    make_config,
    parse_config,
)
from snell_diffusion.vision.config_groups import GROUPS
from snell_diffusion.vision.data import Data


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_protocols_fill_what_is_not_given(protocol: str) -> None:
    found = make_config({"protocol": protocol})
    for name, value in PROTOCOLS[protocol].items():
        assert getattr(found, name) == value, name
        other = 7 if isinstance(value, int) and not isinstance(value, bool) else None
        if other is not None and name != "num_train_epochs":
            assert getattr(make_config({"protocol": protocol, name: other}), name) == other
    unset = {f for f in SETTINGS.keys if getattr(found, f) is None}
    assert not unset & set(PROTOCOLS[protocol])
    assert make_config({"num_train_epochs": 30}).warmup_epochs == 3.0
    assert make_config({"num_train_epochs": 30, "warmup_epochs": 0}).warmup_epochs == 0.0


def test_round_trip(tmp_path: Path) -> None:
    """What is written beside a run is read back to the same run."""
    config = make_config(
        {
            "method": "snella",
            "method_args": {"target_sparsity": 0.3, "train_beta": False, "init": "paper"},
            "levels": [0.1, 0.2],
            "protocol": "paper",
        }
    )
    (tmp_path / "a.yaml").write_text(config_text(config))
    assert parse_config(["--config", str(tmp_path / "a.yaml")]) == config
    changed = parse_config(["--config", str(tmp_path / "a.yaml"), "--learning_rate", "0.5"])
    assert (changed.learning_rate, changed.method_args) == (0.5, config.method_args)
    assert config.method_settings == {"target_sparsity": 0.3, "train_beta": False, "init": "paper"}


def test_command_line() -> None:
    found = parse_config(
        ["--method", "lora", "--rank", "4", "--method_args", "use_rslora=true", "--quiet"]
    )
    assert (found.method, found.rank, found.quiet) == ("lora", 4, True)
    assert found.method_settings == {"use_rslora": True}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat', did you mean 'learning_rate'"),
        ({"learning_rate": 0}, "learning_rate should be greater than 0, got 0"),
        ({"protocol": "papers"}, "protocol should be 'validation' or 'paper', got 'papers'"),
        ({"select_on": "test"}, "select_on test chooses epochs on the images"),
        ({"method_args": ["x"]}, "expected name=value, got 'x'"),
        ({"method_args": ["x=1", "x=2"]}, "name each setting once"),
        ({"method_args": {"rank": 2}}, "rank stand on their own"),
        ({"levels": [0.1, 0.1]}, "name each level once"),
        ({"levels": [1.0]}, "levels.0 should be less than 1"),
        ({"output_dir": None, "checkpointing_epochs": 1}, "checkpoints need output_dir"),
        ({"num_train_epochs": "many"}, "num_train_epochs should be a valid integer"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SnellaConfigError, match=message):
        make_config(values)


def test_unknown_flag() -> None:
    with pytest.raises(SnellaConfigError, match=r"'--epochs'|num_train_epochs"):
        parse_config(["--epochs", "3"])


def test_every_setting_says_what_it_is() -> None:
    """The command line and the page of settings are made of these texts."""
    for group in (*GROUPS, Data):
        for name, field in group.__dataclass_fields__.items():
            text = field.metadata.get("help", "")
            assert len(text) > 20, name
            assert text.endswith("."), name
