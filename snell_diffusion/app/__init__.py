"""The Gradio page: photos in, train on the embedded base, draw with and without the adapter.

Needs the extra `app`. It listens on 127.0.0.1 only and has no sharing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snell_diffusion.app.actions import Actions
from snell_diffusion.app.jobs import SCRIPT, Jobs
from snell_diffusion.app.studio import Studio
from snell_diffusion.versions import require

RECIPE = SCRIPT.parent / "configs" / "dreambooth" / "demo.yaml"
LIMITS = {
    "share": False,
    "max_file_size": "10mb",
    "allowed_paths": [],
    "strict_cors": True,
    "enable_monitoring": False,
    "show_error": False,
    "run_history": False,
    "max_threads": 8,
    "state_session_capacity": 64,
    "mcp_server": False,
    "ssr_mode": False,
}


def make_page(root: Path, base: str | Path, recipe: Path = RECIPE, script: Path = SCRIPT) -> Any:
    """The page over runs in `root`, drawing with the diffusers folder `base`; not launched yet.

    Raises:
        ImportError: gradio is not installed, or too old.
    """
    require("gradio")
    from snell_diffusion.app.layout import build

    page = build(Actions(Jobs(root, script), Studio(base), recipe))
    page.queue(max_size=8, default_concurrency_limit=1)
    return page


def launch(page: Any, port: int | None, *, wait: bool = True) -> str:
    """Serve the page on 127.0.0.1 and return its address; with `wait`, until it is interrupted.

    Args:
        page: From make_page.
        port: 1024 to 65535, or None for the first free one from 7860.
        wait: Block; otherwise the server runs in a thread.
    """
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=not wait, **LIMITS
    )
    return str(address)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of app.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, help="port on 127.0.0.1; default: first free from 7860")
    parser.add_argument("--runs", type=Path, default=Path("runs/app"), help="folder of the runs")
    options = parser.parse_args(arguments)
    from snell_diffusion.models import embedded_path

    launch(make_page(options.runs, embedded_path()), options.port)
