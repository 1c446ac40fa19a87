"""Adapter files of every family, made once."""

from collections.abc import Callable

import pytest

from tests.registry.families import REGISTRY
from tests.registry.made import Made, make


@pytest.fixture(scope="session")
def made_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Adapters of a family by its name."""
    known: dict[str, Made] = {}

    def made(name: str) -> Made:
        if name not in known:
            known[name] = make(REGISTRY[name], tmp_path_factory.mktemp(name))
        return known[name]

    return made


@pytest.fixture(scope="module", params=REGISTRY)
def made(request: pytest.FixtureRequest, made_for: Callable[[str], Made]) -> Made:
    """Each family's adapters in turn."""
    return made_for(request.param)
