"""The gate in front of gradio: an ASGI middleware that refuses with a status and a sentence.

It closes what gradio leaves open: foreign hosts and origins, routes that the page does not use,
requests of any size or depth, addresses to fetch, and what one signed-in user could learn of
another by a file's address or a session's name.
"""

import json
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snell_diffusion.app.admission import (
    call_of,
    host_allowed,
    needs_sign_in,
    origin_allowed,
    route_known,
    site_allowed,
)
from snell_diffusion.app.bodies import read_json, require_uploaded
from snell_diffusion.app.cache import folder_bytes, sweep
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaValueError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

REMEMBERED = 20_000  # files and sessions of all users; the ones not used for longest go first
DRAINED = 64 * 2**20  # bytes of a refused body that are read so that the answer arrives
LONGEST = 64  # characters of a session's name
SPARE = 2**30  # bytes that uploads leave free on the disk
CACHED = re.compile(rb"[0-9a-f]{64}")  # gradio names the folder of a file by a keyed digest
TOLD = (b"application/json", b"text/")
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # gradio's page and its plots need both
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Refusal(Exception):
    """A request that goes no further: HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


@dataclass(frozen=True)
class Rules:
    """What the gate lets in.

    Attributes:
        cache: Folder of uploads and shown pictures; the only files that are served.
        names: Host names of this server.
        public_names: Those of them that a reverse proxy serves.
        any_address: Take every IP address as Host.
        accounts: Whether people sign in.
        limits: Sizes.
    """

    cache: Path
    names: frozenset[str]
    public_names: frozenset[str] = frozenset()
    any_address: bool = False
    accounts: bool = False
    limits: Limits = LIMITS


class Memory:
    """Who owns what, by key; the keys not used for longest are forgotten beyond REMEMBERED."""

    def __init__(self) -> None:
        self._owners: OrderedDict[tuple[str, ...], None] = OrderedDict()

    def add(self, *key: str) -> None:
        self._owners[key] = None
        self._owners.move_to_end(key)
        while len(self._owners) > REMEMBERED:
            self._owners.popitem(last=False)

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._owners


@dataclass
class Sessions:
    """Which user a page's session belongs to: the first that named it."""

    users: OrderedDict[str, str] = field(default_factory=OrderedDict)

    def claim(self, session: str, user: str) -> bool:
        """Whether the session is this user's; one that nobody had becomes theirs."""
        owner = self.users.setdefault(session, user)
        self.users.move_to_end(session)
        while len(self.users) > REMEMBERED:
            self.users.popitem(last=False)
        return owner == user


class Guard:
    """ASGI middleware.

    Args:
        app: What answers the requests that are let in.
        rules: What is let in.
    """

    def __init__(self, app: Any, rules: Rules) -> None:
        self.app = app
        self.rules = rules
        self._seen = Memory()
        self._sessions = Sessions()
        self._size = (0.0, 0)  # when the cache was measured, and its bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # the page uses no websocket
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        body = None
        try:
            self._admit(scope, headers)
            user = self._user(scope, headers)
            body = await self._body(scope, headers, receive)
            self._own(scope, user, body)
        except Refusal as refusal:
            if body is None:
                await _drain(receive, headers)
            await _answer(send, refusal)
            return
        passed = receive if body is None else _replay(body, receive)
        await self.app(scope, passed, self._watched(send, user))

    def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        rules, host = self.rules, headers.get("host", "")
        if not host_allowed(host, rules.names, rules.any_address):
            raise Refusal(403, "this server has another name: open it by the address it printed")
        origin = headers.get("origin")
        if origin is not None and not origin_allowed(origin, host, rules.public_names):
            raise Refusal(403, "requests from other pages are refused: open this page itself")
        site, mode = headers.get("sec-fetch-site", ""), headers.get("sec-fetch-mode", "")
        if not site_allowed(site, mode, scope["method"]):
            raise Refusal(403, "requests from other pages are refused: open this page itself")
        if not route_known(scope["path"]):
            raise Refusal(404, "there is no such page")
        self._require_cached(scope["path"])

    def _require_cached(self, path: str) -> None:
        call = call_of(path) or ""
        if call.startswith("file="):
            name = call.removeprefix("file=")
            if "\0" in name or not Path(name).resolve().is_relative_to(self.rules.cache):
                raise Refusal(403, "this file is not served")

    def _user(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """Who signed in, or None where nobody has to."""
        if not self.rules.accounts:
            return None
        user = signed_in(scope["app"], headers.get("cookie", ""))
        if user is None and needs_sign_in(scope["path"]):
            raise Refusal(401, "sign in first: open the page and enter your name and password")
        return user

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The checked body of a small request; None for those that are passed on as they come."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        call = call_of(scope["path"])
        limits = self.rules.limits
        largest = limits.request_bytes
        if call == "upload":
            largest = limits.photos * limits.upload_bytes + limits.request_bytes
        length = headers.get("content-length", "0" if "transfer-encoding" not in headers else "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(411, "the request does not tell its size; use the page or gradio_client")
        if int(length) > largest:
            raise Refusal(413, f"the request is larger than {largest // 2**20} MB")
        if call == "upload":
            self._require_space(int(length))
            return None
        return await _whole(receive)

    def _require_space(self, more: int) -> None:
        now = time.monotonic()
        if now - self._size[0] > 5:
            sweep(self.rules.cache)
            self._size = (now, folder_bytes(self.rules.cache))
        free = shutil.disk_usage(self.rules.cache).free
        if self._size[1] + more > self.rules.limits.cache_bytes or free < more + SPARE:
            raise Refusal(507, "the server has no room for uploads now; try again tomorrow")
        self._size = (self._size[0], self._size[1] + more)

    def _own(self, scope: Scope, user: str | None, body: bytes | None) -> None:
        """Check what the request names: only uploaded files, and nothing of another user's."""
        call = call_of(scope["path"]) or ""
        query = scope.get("query_string", b"")
        session = re.search(rb"(?:^|&)session_hash=([^&]*)", query)
        sessions = [session[1].decode("latin-1")] if session else []
        if call.startswith("heartbeat/"):
            sessions.append(call.removeprefix("heartbeat/"))
        if body is not None and call:
            sessions += self._checked(body)
        if any(len(session) > LONGEST for session in sessions):
            raise Refusal(400, "the session's name is too long: reload the page and try again")
        if user is None:
            return
        named = CACHED.findall(scope["path"].encode() + b" " + (body or b""))
        if any((user, digest.decode()) not in self._seen for digest in named):
            raise Refusal(404, "there is no such file: reload the page and try again")
        if not all(self._sessions.claim(session, user) for session in sessions):
            raise Refusal(404, "there is no such session: reload the page and try again")

    def _checked(self, body: bytes) -> list[str]:
        """Sessions that a JSON body names."""
        try:
            value = read_json(body, self.rules.limits.request_depth)
            require_uploaded(value, self.rules.cache)
        except SnellaValueError as error:
            raise Refusal(400, str(error)) from None
        session = value.get("session_hash") if isinstance(value, dict) else None
        return [session] if isinstance(session, str) else []

    def _watched(self, send: Send, user: str | None) -> Send:
        """`send` with our headers, remembering which files the user was told of."""
        told = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal told
            if message["type"] == "http.response.start":
                kinds = dict(message["headers"])
                told = user is not None and kinds.get(b"content-type", b"").startswith(TOLD)
                message["headers"] = [*message["headers"], *HEADERS]
            elif told and user is not None:
                for digest in CACHED.findall(message.get("body", b"")):
                    self._seen.add(user, digest.decode())
            await send(message)

        return watched


def signed_in(app: Any, cookies: str) -> str | None:
    """Name of the user whose session the cookies hold, as gradio keeps it; None without one."""
    held = dict(part.strip().partition("=")[::2] for part in cookies.split(";"))
    for kind in ("access-token", "access-token-unsecure"):
        user = app.tokens.get(held.get(f"{kind}-{app.cookie_id}"))
        if user is not None:
            return str(user)
    return None


async def _whole(receive: Receive) -> bytes:
    """The body, whose announced length was checked; the HTTP server holds the client to it."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first and then what the client does next."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replay


async def _drain(receive: Receive, headers: dict[str, str]) -> None:
    """Read and forget the rest of a refused body: clients look for the answer after sending it."""
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or not 0 < int(length) <= DRAINED:
        return
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


async def _answer(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"error": refusal.sentence, "detail": refusal.sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *HEADERS]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
