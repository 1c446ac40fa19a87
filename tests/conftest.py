"""What every test shares: one thread, no network, and the optional DreamBooth photos."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # 1 and 2 threads differ in the last bits
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

pytest_plugins = ["tests.rows"]

ROOT = Path(__file__).resolve().parents[1]
DREAMBOOTH = ROOT.parent / "shared" / "dreambooth"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, help="how often the kill tests kill; default 12 or 60")
    parser.addoption("--seed", type=int, help="seed of the tests that draw at random; printed")
    parser.addoption(
        "--publish-screenshots",
        action="store_true",
        help="copy the browser tests' pictures of the page to docs/images/",
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def dreambooth() -> Callable[[str], Path]:
    """Folder of one DreamBooth subject by name; skips, with the reason, where it is absent."""

    def folder(subject: str) -> Path:
        path = DREAMBOOTH / subject
        if not path.is_dir():
            pytest.skip(f"no DreamBooth photos of {subject!r} in ../shared/dreambooth")
        return path

    return folder
