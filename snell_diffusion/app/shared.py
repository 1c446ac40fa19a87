"""What the tabs of the page have in common."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from snell_diffusion.app.workspace import App, Workspace
from snell_diffusion.errors import SnellaError

POLL = 2.0  # seconds between two looks at a run
PIPELINE: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}
PICTURE: dict[str, Any] = {
    "interactive": False,
    "format": "png",
    "buttons": ["download", "fullscreen"],
}
HIDDEN: dict[str, Any] = {"api_visibility": "private"}  # the public ways in are in endpoints.py
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, **HIDDEN}


def said(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn this package's errors into the page's; any other error stays a bug with a traceback.

    A generator stays one: closing it closes the function's own.
    """

    return translated(
        function, SnellaError, lambda error: gr.Error(str(error), print_exception=False)
    )


def translated(
    function: Callable[..., Any],
    kind: type[Exception],
    into: Callable[[Exception], Exception],
) -> Callable[..., Any]:
    """The function, or the generator, with its errors of a kind raised as others."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except kind as error:
            raise into(error) from error

    @functools.wraps(function)
    def generate(*arguments: Any, **named: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments, **named)
        except kind as error:
            raise into(error) from error

    return generate if inspect.isgeneratorfunction(function) else call


@dataclass
class Shared:
    """The page while it is being built.

    Attributes:
        app: What the handlers work on.
        page: The page.
        tabs: Its tabs, chosen by id.
        wanted: Id of the adapter that another tab asked to be drawn with.
    """

    app: App
    page: gr.Blocks
    tabs: gr.Tabs
    wanted: gr.State
    _shown: dict[str, list[tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]]] = field(
        default_factory=dict
    )

    def workspace(self, request: gr.Request | None) -> Workspace:
        """Whose page this is."""
        return self.app.workspaces.of(None if request is None else request.username)

    def on_show(
        self,
        tab: str,
        function: Callable[..., Any],
        outputs: Sequence[Any],
        inputs: Sequence[Any] = (),
    ) -> None:
        """Call a function when the page loads and whenever a tab is opened: for refreshing lists.

        Args:
            tab: Id of the tab.
            function: Gets the inputs and, if it asks for it, the request.
            outputs: What it updates.
            inputs: Components whose values it gets.
        """
        self._shown.setdefault(tab, []).append((function, inputs, outputs))

    def connect(self, tab: str, opened: gr.Tab) -> None:
        """Attach what `on_show` gathered for a tab."""
        for function, inputs, outputs in self._shown.get(tab, []):
            for event in (self.page.load, opened.select):
                event(said(function), list(inputs), list(outputs), **QUIET)
