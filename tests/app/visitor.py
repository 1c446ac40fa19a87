"""A visitor of the page without a browser: presses its controls by their ids, over HTTP."""

import secrets
from typing import Any

import httpx
from gradio_client import Client
from gradio_client.client import Endpoint
from gradio_client.utils import SKIP_COMPONENTS


class Visitor:
    """One visit: remembers what the controls show, as a browser does.

    Args:
        address: Of the page.
    """

    def __init__(self, address: str) -> None:
        self.client = Client(address, verbose=False)
        self.ids: dict[str, int] = {}
        self.values: dict[int, Any] = {}
        self.names: dict[int, str] = {}
        for part in self.client.config["components"]:
            name = part["props"].get("elem_id") or f"#{part['id']}"
            self.ids[name], self.names[part["id"]] = part["id"], name
            self.values[part["id"]] = part["props"].get("value")
        self._skipped = {  # by gradio_client: states, rows and the like
            part["id"]
            for part in self.client.config["components"]
            if part["type"] in SKIP_COMPONENTS
        }
        self.dependencies = self.client.config["dependencies"]

    def close(self) -> None:
        self.client.close()

    def show(self, tab: str) -> None:
        """Open a tab: its lists are read anew."""
        for event in self.events(f"tab-{tab}", "select"):
            self._run(event)

    def press(self, name: str, event: str = "click", **changes: Any) -> dict[str, Any]:
        """Set controls, then do what an event of a control does; returns what was updated.

        Args:
            name: Id of the control.
            event: Of the control.
            changes: Values by control, with _ for -.
        """
        self.set(**changes)
        updates: dict[str, Any] = {}
        for dependency in self.events(name, event):
            updates |= self._run(dependency)
        return updates

    def set(self, **changes: Any) -> None:
        """Give controls other values."""
        for name, value in changes.items():
            self.values[self.ids[name.replace("_", "-")]] = value

    def value(self, name: str) -> Any:
        """What a control shows."""
        return self.values[self.ids[name]]

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        """The events of a control in order, without those that cancel others."""
        target = [self.ids[name], event]
        return [
            known
            for known in self.dependencies
            if target in [list(pair) for pair in known["targets"]] and not known["cancels"]
        ]

    def submit(self, dependency: dict[str, Any]) -> Any:
        """Start an event with the values of this moment; gradio_client's job."""
        opened = {**dependency, "api_visibility": "undocumented"}
        number = dependency["id"]
        self.client.endpoints[number] = Endpoint(self.client, number, opened, self.client.protocol)
        return self.client.submit(
            *(self.values[part] for part in self._inputs(dependency)), fn_index=number
        )

    def _inputs(self, dependency: dict[str, Any]) -> list[int]:
        return [part for part in dependency["inputs"] if part not in self._skipped]

    def _run(self, dependency: dict[str, Any]) -> dict[str, Any]:
        job = self.submit(dependency)
        job.result(timeout=120)
        updates: dict[str, Any] = {}
        outputs = [part for part in dependency["outputs"] if part not in self._skipped]
        for found in job.outputs() if outputs else []:  # of a generator, all it gave
            for part, update in zip(outputs, found if len(outputs) > 1 else [found], strict=True):
                self._take(part, update, updates)
        return updates

    def _take(self, part: int, update: Any, updates: dict[str, Any]) -> None:
        shown = isinstance(update, dict) and update.get("__type__") == "update"
        if shown and len(update) == 1:
            return  # left as it was
        if not shown or "value" in update:
            self.values[part] = update["value"] if shown else update
        updates[self.names[part]] = update


class Wire:
    """A visitor who can pull the plug: the protocol of a page's events without a client library."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=60)
        self.session = secrets.token_hex(6)

    def join(self, number: int, values: list[Any]) -> str:
        """Put an event into the queue; returns its id."""
        body = {"data": values, "fn_index": number, "session_hash": self.session}
        answer = self.http.post("gradio_api/queue/join", json=body)
        answer.raise_for_status()
        return str(answer.json()["event_id"])

    def listen(self) -> Any:
        """The stream of messages, as a context; leaving it is what a closed page does."""
        return self.http.stream(
            "GET", "gradio_api/queue/data", params={"session_hash": self.session}
        )

    def cancel(self, number: int, event: str) -> None:
        """What the page sends when Cancel is pressed."""
        body = {"session_hash": self.session, "fn_index": number, "event_id": event}
        self.http.post("gradio_api/cancel", json=body).raise_for_status()
