"""A really launched page over a tiny random base model, one per test module."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from snell_diffusion.app import launch, make_page
from snell_diffusion.app.bases import Bases, described
from snell_diffusion.app.studio import Studio
from snell_diffusion.app.workspace import App, Workspaces
from tests import tiny_models


@dataclass(frozen=True)
class Server:
    """A running page: its address, what it works on, and the folder of its workspaces."""

    address: str
    app: App
    root: Path


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """Folder of a random Stable Diffusion of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("base")
    tiny_models.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_app(tiny_base, tmp_path_factory):
    """An App over the tiny base, without a page."""
    folder = tmp_path_factory.mktemp("app")
    bases = Bases([described("tiny", str(tiny_base))])
    workspaces = Workspaces(folder / "runs", bases=bases)
    return App(workspaces, Studio(bases))


@pytest.fixture(scope="module")
def page_server(tiny_app):
    """The page of `tiny_app`, served on a free port of 127.0.0.1."""
    page = make_page(tiny_app)
    address = launch(page, wait=False)
    yield Server(address, tiny_app, tiny_app.workspaces.root)
    page.close()
