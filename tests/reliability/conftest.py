"""Shared by the reliability tests: a tiny base model on disk."""

from pathlib import Path

import pytest

from tests import tiny_models


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion pipeline (epsilon prediction) as a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_models.pipeline().save_pretrained(folder)
    return folder
