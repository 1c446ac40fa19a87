"""Tiny vision models with random weights, saved once, and pictures that can be told apart."""

from pathlib import Path

import pytest

from tests.vision import runs


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny bases by family: vit, swin, convnext."""
    root = tmp_path_factory.mktemp("bases")
    return {name: str(runs.save_base(name, root / name)) for name in runs.BASES}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, val and test, three classes of coloured noise."""
    return runs.write_pictures(tmp_path_factory.mktemp("pictures"))
