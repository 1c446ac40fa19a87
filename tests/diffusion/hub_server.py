"""A hub on this machine: what the real huggingface_hub client asks for when a run is uploaded."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "goodtoken" * 3
_COMMIT = "0" * 40
_COMMITTED = {"commitOid": _COMMIT, "success": True, "hookOutput": ""}


class Hub:
    """What has been asked and stored.

    Attributes:
        address: Of the server.
        asked: (method, path) of every request.
        files: By path in the repository, the bytes that were committed.
        created: What the client wanted of the repository.
        refuse: Answer a commit with this status; 0 takes it.
    """

    def __init__(self) -> None:
        self.address = ""
        self.asked: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.refuse = 0
        self.large: dict[str, bytes] = {}
        self.cards: dict[str, str] = {}

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, bytes]:
        """Status and body for one request."""
        self.asked.append((method, path))
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, b"{}"
        repository, _, file = path.lstrip("/").partition("/resolve/main/")
        if file:
            found = self.cards.get(repository, "") if file == "README.md" else ""
            return (200, found.encode()) if found else (404, b"{}")
        if token != f"Bearer {TOKEN}":
            return 401, b'{"error": "Invalid credentials"}'
        status, data = self._api(path, body)
        return status, json.dumps(data).encode()

    def _api(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/me/{self.created['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            wanted = json.loads(body)["files"]
            return 200, {"files": [_mode(entry["path"]) for entry in wanted]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._place(o) for o in json.loads(body)["objects"]],
            }
        if "/commit/" in path:
            if self.refuse:
                return self.refuse, {"error": "no space for you"}
            self._commit(body)
            return 200, {**_COMMITTED, "commitUrl": f"{self.address}/me/cat/commit/{_COMMIT}"}
        return 404, {"error": f"unknown {path}"}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/large/{wanted['oid']}"}}}

    def _commit(self, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that listens on this machine inside the context."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, data = hub.answer(
                self.command, path, body, self.headers.get("Authorization", "")
            )
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"0"')
            self.send_header("X-Repo-Commit", _COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
