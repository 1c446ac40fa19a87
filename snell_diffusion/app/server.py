"""Serves the page: gradio's settings, the gate in front of it, and who may sign in."""

import asyncio
import hmac
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from snell_diffusion.app import page
from snell_diffusion.app.admission import LOOPBACK_NAMES
from snell_diffusion.app.cache import sweep
from snell_diffusion.app.guard import Guard, Rules
from snell_diffusion.app.options import Options, is_loopback
from snell_diffusion.app.workspace import App

STYLE = Path(__file__).parent / "style.css"
CACHE = "cache"  # folder of uploads and shown pictures, below the folder of the runs
PAUSE = 1.0  # seconds that a wrong password costs
WELCOME = "This page draws pictures with models that were taught a subject. Sign in to go on."
FIXED: dict[str, Any] = {
    "quiet": True,  # its greeting recommends a public link
    "share": False,
    "allowed_paths": [],
    "strict_cors": True,
    "enable_monitoring": False,
    "show_error": False,
    "run_history": False,
    "max_threads": 8,
    "state_session_capacity": 64,
    "num_workers": 0,  # processes that would serve files past the gate
    "mcp_server": False,
    "ssr_mode": False,
    "pwa": False,
    "footer_links": ["api"],
}


def prepare_cache(root: Path) -> Path:
    """Make the folder of uploads and shown pictures, and point gradio at it.

    Readable by this user only. What is older than a day has been left by an earlier server.

    Args:
        root: Folder of the runs; made here.
    """
    cache = root.resolve() / CACHE
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    cache.chmod(0o700)
    sweep(cache)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(cache / "examples")
    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_BLOCKED_PATHS", "GRADIO_ROOT_PATH"):
        os.environ.pop(name, None)  # would widen what is served
    return cache


def make_page(app: App) -> gr.Blocks:
    """The page over an app, with its queue; not launched yet."""
    prepare_cache(app.workspaces.root)
    made = page.build(app)
    made.queue(max_size=app.limits.queue, default_concurrency_limit=1)
    made.snella = app  # launch() needs the folder of its runs and its limits
    return made


def launch(made: gr.Blocks, options: Options | None = None, *, wait: bool = True) -> str:
    """Serve a page and return its address; with `wait`, until it is interrupted.

    Args:
        made: From make_page.
        options: Address, port, names and accounts; default: this machine only, no accounts.
        wait: Block; otherwise the server runs in a thread.
    """
    options = options or Options()
    _, address, _ = made.launch(**settings(options, made.snella), prevent_thread_lock=True)
    print(f"The page is on {address} (Ctrl-C ends it)", flush=True)
    if wait:
        made.block_thread()
    return str(address)


def settings(options: Options, app: App) -> dict[str, Any]:
    """What gradio's launch gets: nothing that a person could switch off by accident."""
    cache = app.workspaces.root / CACHE
    guard = Middleware(Guard, rules=rules(options, cache, app))
    return {
        **FIXED,
        "server_name": options.host,
        "server_port": options.port,
        "inbrowser": options.open_browser,
        "auth": signs_in(options.accounts) if options.accounts else None,
        "auth_message": WELCOME,
        "max_file_size": max(app.limits.upload_bytes, app.limits.adapter_bytes),
        "blocked_paths": blocked_paths(cache),
        "app_kwargs": {"middleware": [guard], "openapi_url": None},
        "theme": theme(),
        "css_paths": STYLE,
    }


def rules(options: Options, cache: Path, app: App) -> Rules:
    """What the gate lets in under these options."""
    names = set(LOOPBACK_NAMES) | set(options.public_names)
    if not is_loopback(options.host):
        names |= {socket.gethostname().lower(), options.host.lower()}
    return Rules(
        cache=cache,
        names=frozenset(names),
        public_names=frozenset(options.public_names),
        any_address=not is_loopback(options.host),
        accounts=bool(options.accounts),
        limits=app.limits,
    )


def blocked_paths(cache: Path) -> list[str]:
    """The home and working folder, as far as the cache is not inside: only it is served anyway."""
    folders = {Path.home().resolve(), Path.cwd().resolve()}
    return sorted(str(folder) for folder in folders if folder not in cache.parents)


def signs_in(accounts: Mapping[str, str]) -> Callable[[str, str], Awaitable[bool]]:
    """Whether a name and a password are an account's; a wrong one is answered after a second.

    Wrong ones wait in line, so that many at once are no faster. An unknown name takes as long.
    """
    turn = asyncio.Lock()

    async def check(name: str, password: str) -> bool:
        known = accounts.get(name, "")
        right = hmac.compare_digest(password.encode(), known.encode())
        if right and known:
            return True
        async with turn:
            await asyncio.sleep(PAUSE)
        return False

    return check


def theme() -> gr.themes.Base:
    """Gradio's own colours with darker buttons and hints, in fonts that gradio ships.

    In weights that it ships whole: of its semibold ones half of the letters are missing.
    """
    text = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    code = gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))
    return gr.themes.Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        font=[text, "system-ui", "sans-serif"],
        font_mono=[code, "ui-monospace", "monospace"],
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
    )
