"""A setting that does nothing beside the others is told, and one that works is not."""

from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import make_config
from snell_diffusion.diffusion.config_idle import _NEEDS, idle_settings
from snell_diffusion.diffusion.training import run
from tests.diffusion.training_runs import config

LEAST = {"instance_data_dir": "photos", "instance_prompt": "a sks cat"}
HELD_OUT = {"validation_steps": 2, "num_validation_photos": 1}

# Setting, value, what is told of it alone, and what it needs.
CASES: list[tuple[str, Any, str, dict[str, Any]]] = [
    ("torch_compile_backend", "eager", "torch_compile is no", {"torch_compile": "model"}),
    ("unmasked_weight", 0, "masked_loss is not given", {"masked_loss": True}),
    (
        "prior_loss_weight",
        2,
        "with_prior_preservation is not given",
        {"with_prior_preservation": True, "class_prompt": "a cat"},
    ),
    ("text_encoder_rank", 2, "train_text_encoder is not given", {"train_text_encoder": True}),
    ("text_encoder_lr", 1e-4, "train_text_encoder is not given", {"train_text_encoder": True}),
    ("token_learning_rate", 1e-2, "new_tokens is not given", {"new_tokens": ["<cup>"]}),
    ("lr_warmup_steps", 5, "lr_scheduler is constant", {"lr_scheduler": "linear"}),
    ("lr_num_cycles", 2, "lr_scheduler is constant", {"lr_scheduler": "cosine_with_restarts"}),
    ("lr_power", 2, "lr_scheduler is constant", {"lr_scheduler": "polynomial"}),
    (
        "early_stopping_min_delta",
        0.1,
        "early_stopping_patience is not given",
        {"early_stopping_patience": 2, **HELD_OUT},
    ),
    ("hub_private_repo", True, "push_to_hub is not given", {"push_to_hub": True}),
]


def idle(**values: Any) -> list[str]:
    return idle_settings(make_config({**LEAST, **values}))


@pytest.mark.parametrize("setting, value, reason, needed", CASES, ids=[c[0] for c in CASES])
def test_a_setting_without_what_it_needs_is_told(
    setting: str, value: Any, reason: str, needed: dict[str, Any]
) -> None:
    assert idle(**{setting: value}) == [f"{setting} has no effect, since {reason}"]
    assert idle(**{setting: value}, **needed) == []


def test_another_value_of_what_is_needed_is_told() -> None:
    told = ["lr_power has no effect, since lr_scheduler is cosine"]
    assert idle(lr_power=2, lr_scheduler="cosine") == told


def test_every_entry_is_tried_and_defaults_are_silent() -> None:
    assert {case[0] for case in CASES} == _NEEDS.keys()
    assert idle() == []
    assert idle(**{key: getattr(TrainConfig(**LEAST), key) for key in _NEEDS}) == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_tells_it(dry_run: bool, tiny_base: Path, tmp_path: Path) -> None:
    result = run(config(tiny_base, tmp_path, max_train_steps=1, lr_power=2, dry_run=dry_run))
    notes = [event["message"] for event in result.history if event["event"] == "note"]
    assert "lr_power has no effect, since lr_scheduler is constant" in notes
