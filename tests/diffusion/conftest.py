"""Shared by the tests of diffusion training: a tiny base model on disk."""

from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.training import RunResult, run
from tests import tiny_models
from tests.diffusion.training_runs import FULL, config


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion pipeline (epsilon prediction) as a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_models.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, RunResult, list[dict[str, Any]]]:
    """One run with everything on."""
    settings = config(tiny_base, tmp_path_factory.mktemp("full"), **FULL)
    events: list[dict[str, Any]] = []
    return settings, run(settings, events.append), events
