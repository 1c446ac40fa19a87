"""Which requests are let in, from their addresses alone: host, origin and route, as plain values.

A page of the web that is open in somebody's browser can send requests to this server. Browsers tell
where a request comes from (Origin, Sec-Fetch-Site), and which name was asked for (Host): a name of
somebody else's that resolves to this machine is an attack (DNS rebinding).
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
API = "/gradio_api/"
PAGES = frozenset(
    {"/", "/config", "/login", "/logout", "/theme.css", "/favicon.ico", "/robots.txt"}
)
PARTS = ("/assets/", "/static/", "/svelte/")  # of the page itself, the same for everybody
# What the page and gradio_client call; all else that gradio answers is refused: its proxy, its
# editor, its recordings, its monitor, its deep links, and the visitor's token.
CALLS = frozenset(
    {"app_id", "cancel", "info", "login_check", "reset", "startup-events", "theme.css"}
)
CALLS |= {"upload", "upload_progress", "user"}
CALL_GROUPS = ("call/", "file=", "heartbeat/", "queue/", "run/")
BEFORE_SIGN_IN = frozenset({"app_id", "info", "login_check", "startup-events", "theme.css", "user"})


def host_name(host: str) -> str:
    """The name or address of a Host header, in lower case, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether a host is named by its IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def host_allowed(host: str, names: Collection[str], any_address: bool) -> bool:
    """Whether a Host header names this server.

    Args:
        host: The header, with or without a port.
        names: Host names of this server, in lower case.
        any_address: Take every IP address: a name that was rebound is never one.
    """
    name = host_name(host)
    return name in names or (any_address and is_address(name))


def origin_allowed(origin: str, host: str, public_names: Collection[str]) -> bool:
    """Whether an Origin header is of this very page.

    Args:
        origin: Such as http://127.0.0.1:7860; "null" is none of ours.
        host: The Host header: origin and host must be the same name and port.
        public_names: Names under which a reverse proxy serves the page on a port of its own.
    """
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return False
    return parts.netloc.lower() == host.lower() or (parts.hostname or "") in public_names


def site_allowed(site: str, mode: str, method: str) -> bool:
    """Whether the browser says that no other site's page is behind this request.

    Args:
        site: Sec-Fetch-Site header, "" if the client sends none.
        mode: Sec-Fetch-Mode header; following a link from another site is fine.
        method: HTTP method.
    """
    followed = mode == "navigate" and method == "GET"
    return site in ("", "none", "same-origin") or followed


def call_of(path: str) -> str | None:
    """What is called below /gradio_api/, such as "queue/join"; None for the page and its parts."""
    return path.removeprefix(API).rstrip("/") if path.startswith(API) else None


def route_known(path: str) -> bool:
    """Whether the page or its clients use this route."""
    call = call_of(path)
    if call is not None:
        return call in CALLS or call.startswith(CALL_GROUPS)
    return path in PAGES or path.rstrip("/") in PAGES or path.startswith(PARTS)


def needs_sign_in(path: str) -> bool:
    """Whether a route is only for those who signed in; the other ones hold nothing of a user."""
    call = call_of(path)
    return call is not None and call not in BEFORE_SIGN_IN
