"""The Gradio page: photos in, train, draw with and without the adapter (docs/app.md).

Needs the extra `app`. It listens on 127.0.0.1 unless it is told otherwise, and shares nothing.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snell_diffusion.versions import require

if TYPE_CHECKING:
    from snell_diffusion.app.options import Options
    from snell_diffusion.app.workspace import App

__all__ = ["launch", "main", "make_app", "make_page"]


def make_app(options: "Options") -> "App":
    """What the page works on: the workspaces, the base models and the worker that draws.

    Raises:
        SnellaError: A base model is not there or is of no known kind.
    """
    from snell_diffusion.app.bases import Bases
    from snell_diffusion.app.studio import Studio
    from snell_diffusion.app.workspace import App, Workspaces

    bases = Bases.of(options.bases, options.limits)
    return App(
        Workspaces(options.runs, bases=bases, limits=options.limits),
        Studio(bases, options.limits),
        options.exposed,
        options.limits,
    )


def make_page(app: "App") -> Any:
    """The page over an app; not launched yet.

    Raises:
        ImportError: gradio is not installed, or too old.
    """
    _prepare()
    from snell_diffusion.app import server

    return server.make_page(app)


def launch(page: Any, options: "Options | None" = None, *, wait: bool = True) -> str:
    """Serve a page and return its address; with `wait`, until it is interrupted.

    Args:
        page: From make_page.
        options: Address, port, names and accounts; default: this machine only, no accounts.
        wait: Block; otherwise the server runs in a thread.
    """
    from snell_diffusion.app import server

    return server.launch(page, options, wait=wait)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of app.py."""
    from snell_diffusion.app.options import read_options
    from snell_diffusion.errors import SnellaError

    options = read_options(arguments)
    try:
        page = make_page(make_app(options))
    except SnellaError as error:
        sys.exit(f"app.py: {error}")
    launch(page, options)


def _prepare() -> None:
    """Set what gradio and the hub read when they are imported: they are to report nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    require("gradio")
