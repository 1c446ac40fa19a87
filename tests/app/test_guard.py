"""The gate, without gradio behind it: what is let in, and what a refusal says."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from snell_diffusion.app import guard as module
from snell_diffusion.app.admission import (
    host_allowed,
    needs_sign_in,
    origin_allowed,
    route_known,
    site_allowed,
)
from snell_diffusion.app.bodies import nesting, paths_in, read_json, require_uploaded
from snell_diffusion.app.guard import Guard, Memory, Rules, Sessions
from snell_diffusion.app.limits import Limits
from snell_diffusion.errors import SnellaValueError

JOIN = "/gradio_api/queue/join"


@pytest.mark.parametrize(
    "host, taken",
    [
        ("127.0.0.1:7860", True),
        ("localhost:9000", True),
        ("[::1]:7860", True),
        ("LOCALHOST", True),
        ("localhost.", True),
        ("evil.example:7860", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example@127.0.0.1", True),  # no browser sends it; what counts is the name
        ("192.168.1.5:7860", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_hosts_of_this_machine_are_taken(host, taken):
    names = {"127.0.0.1", "localhost", "::1"}
    assert host_allowed(host, names, any_address=False) is taken


def test_an_exposed_server_takes_its_names_and_every_address():
    assert host_allowed("192.168.1.5:7860", {"box"}, any_address=True)
    assert host_allowed("Box:7860", {"box"}, any_address=True)
    assert not host_allowed("evil.example", {"box"}, any_address=True)


@pytest.mark.parametrize(
    "origin, taken",
    [
        ("http://127.0.0.1:7860", True),
        ("https://photos.example.org", True),
        ("http://127.0.0.1:3000", False),
        ("http://localhost:7860", False),
        ("https://evil.example", False),
        ("null", False),
        ("file://", False),
        ("", False),
    ],
)
def test_only_the_page_itself_is_an_origin(origin, taken):
    assert origin_allowed(origin, "127.0.0.1:7860", {"photos.example.org"}) is taken


@pytest.mark.parametrize(
    "site, mode, method, taken",
    [
        ("", "", "POST", True),
        ("same-origin", "cors", "POST", True),
        ("none", "navigate", "GET", True),
        ("cross-site", "navigate", "GET", True),
        ("cross-site", "navigate", "POST", False),
        ("cross-site", "no-cors", "GET", False),
        ("same-site", "cors", "GET", False),
    ],
)
def test_other_sites_may_only_link_here(site, mode, method, taken):
    assert site_allowed(site, mode, method) is taken


@pytest.mark.parametrize(
    "path",
    ["/monitoring", "/monitoring/summary", "/docs", "/openapi.json", "/x", "/gradio_api/token"]
    + [f"/gradio_api/{name}" for name in ("vibe-edit/", "proxy=http://x", "deep_link", "runs")]
    + [f"/gradio_api/{name}" for name in ("process_recording", "stream/1", "dev/reload", "")],
)
def test_routes_that_the_page_does_not_use_are_closed(path):
    assert not route_known(path)


def test_before_signing_in_only_the_page_is_open():
    assert all(route_known(path) for path in ("/", "/config", "/login/", "/assets/index.js", JOIN))
    assert not any(needs_sign_in(path) for path in ("/", "/login", "/assets/x", "/theme.css"))
    for call in ("queue/data", "upload", "file=/x", "heartbeat/1", "cancel", "run/predict"):
        assert needs_sign_in(f"/gradio_api/{call}")


def test_nesting_counts_outside_of_texts():
    assert nesting(b"") == nesting(b'"[[["') == nesting(rb'"\"[["') == 0
    assert nesting(b'{"a": [1, {"b": "]]"}]}') == 3
    with pytest.raises(SnellaValueError, match="nested deeper than 32"):
        read_json(b"[" * 50_000 + b"]" * 50_000, 32)
    with pytest.raises(SnellaValueError, match="not JSON"):
        read_json(b"{", 32)
    assert read_json(b"  ", 32) is None


@pytest.mark.parametrize(
    "path",
    ["http://127.0.0.1/x", "file:///etc/passwd", "//x/y", "data:,x", "/etc/passwd", "", "a\0b"],
)
def test_files_that_were_not_uploaded_are_refused(cache, path):
    value = {"data": [[{"image": {"path": path}}]]}
    assert list(paths_in(value)) == [path]
    with pytest.raises(SnellaValueError, match="upload the file itself"):
        require_uploaded(value, cache)
    with pytest.raises(SnellaValueError, match="upload the file itself"):
        require_uploaded({"path": f"{cache}/../secret"}, cache)
    require_uploaded({"data": ["http://x in a prompt", {"path": f"{cache}/a/b.png"}]}, cache)


def test_memory_forgets_what_was_not_used_for_longest(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 2)
    memory, sessions = Memory(), Sessions()
    for name in ("a", "b", "a", "c"):
        memory.add("ann", name)
    assert [("ann", name) in memory for name in "abc"] == [True, False, True]
    assert sessions.claim("s", "ann")
    assert not sessions.claim("s", "bob")
    assert sessions.claim("t", "bob")
    assert len(sessions.users) == 2


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def send_through(guard, path, body=b"", headers=(), method=None, tokens=None, query=b"", more=b""):
    """(status, answer, what reached the app) of one request."""
    sent, reached, waiting = [], [], [body]

    async def app(scope, receive, send):
        reached.append((await receive())["body"])
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"ok " + reached[0] + more})

    async def receive():
        if not waiting:
            await asyncio.Event().wait()  # as a client that sends no more
        return {"type": "http.request", "body": waiting.pop(), "more_body": False}

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860", "content-length": str(len(body)), **dict(headers)}
    scope = {
        "type": "http",
        "method": method or ("POST" if body else "GET"),
        "path": path,
        "query_string": query,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "app": SimpleNamespace(tokens=tokens or {}, cookie_id="id"),
    }
    guard.app = app
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 5))
    assert dict(sent[0]["headers"])[b"x-content-type-options"] == b"nosniff"
    return sent[0]["status"], sent[1]["body"], reached


def rules(cache, **changes):
    return Rules(cache=cache, names=frozenset({"127.0.0.1"}), **changes)


def test_what_is_let_in_arrives_whole(cache):
    body = json.dumps({"data": ["a cat", {"path": str(cache / "x.png")}]}).encode()
    assert send_through(Guard(None, rules(cache)), JOIN, body) == (200, b"ok " + body, [body])


@pytest.mark.parametrize(
    "path, body, headers, status, sentence",
    [
        ("/", b"", {"host": "evil.example"}, 403, "another name"),
        (JOIN, b"{}", {"origin": "https://evil.example"}, 403, "other pages"),
        ("/gradio_api/upload", b"x", {"origin": "null"}, 403, "other pages"),
        ("/gradio_api/file=x", b"", {"sec-fetch-site": "cross-site"}, 403, "other pages"),
        ("/monitoring", b"", {}, 404, "no such page"),
        ("/gradio_api/file=/etc/passwd", b"", {}, 403, "not served"),
        ("/gradio_api/file=http://x/y", b"", {}, 403, "not served"),
        (JOIN, b"[" * 99 + b"]" * 99, {}, 400, "nested deeper"),
        (JOIN, b'{"data": [{"path": "http://x"}]}', {}, 400, "upload the file itself"),
        (JOIN, b"{}", {"content-length": str(2**21)}, 413, "larger than 1 MB"),
        (JOIN, b"{}", {"content-length": "x"}, 411, "tell its size"),
        ("/login", b"x", {"content-length": str(2**21)}, 413, "larger than 1 MB"),
        ("/gradio_api/upload", b"x", {"content-length": str(2**40)}, 413, "larger than"),
        (JOIN, json.dumps({"session_hash": "x" * 65}).encode(), {}, 400, "too long"),
    ],
)
def test_what_is_refused_gets_a_sentence_and_reaches_nothing(
    cache, path, body, headers, status, sentence
):
    found, answer, reached = send_through(Guard(None, rules(cache)), path, body, headers)
    assert (found, reached) == (status, [])
    assert sentence in json.loads(answer)["error"]
    assert str(cache) not in answer.decode()


def test_a_link_in_the_cache_does_not_lead_out_of_it(cache, tmp_path):
    (tmp_path / "secret").write_text("x")
    (cache / "link").symlink_to(tmp_path / "secret")
    (cache / "own").write_text("x")
    gate = Guard(None, rules(cache))
    assert send_through(gate, f"/gradio_api/file={cache}/link")[0] == 403
    assert send_through(gate, f"/gradio_api/file={cache}/../secret")[0] == 403
    assert send_through(gate, f"/gradio_api/file={cache}/own")[0] == 200


def test_uploads_stop_when_the_cache_is_full(cache):
    (cache / "old").write_bytes(bytes(1000))
    gate = Guard(None, rules(cache, limits=Limits(cache_bytes=1500)))
    assert send_through(gate, "/gradio_api/upload", b"x" * 400)[0] == 200
    status, answer, _ = send_through(gate, "/gradio_api/upload", b"x" * 400)
    assert (status, json.loads(answer)["detail"][:25]) == (507, "the server has no room fo")


def test_a_user_gets_only_files_and_sessions_of_their_own(cache):
    gate = Guard(None, rules(cache, accounts=True))
    tokens = {"t1": "ann", "t2": "bob"}
    ann, bob = ({"cookie": f"a=b; access-token-unsecure-id={token}"} for token in tokens)
    digest = "ab" * 32
    file = f"/gradio_api/file={cache}/{digest}/x.png"
    told = json.dumps({"session_hash": "s1"}).encode()

    def ask(who, path, body=b"", query=b""):
        return send_through(gate, path, body, who, tokens=tokens, query=query)[0]

    assert ask({}, "/") == 200
    assert ask({}, JOIN, told) == ask({}, file) == 401
    assert ask({"cookie": "access-token-unsecure-id=t3"}, file) == 401
    assert ask(ann, file) == 404  # nobody has told her of it yet
    gate._seen.add("ann", digest)
    assert ask(ann, file) == 200
    assert ask(bob, file) == 404
    assert ask(bob, JOIN, json.dumps({"data": [{"path": f"{cache}/{digest}/x"}]}).encode()) == 404
    assert ask(ann, JOIN, told) == 200
    assert ask(bob, JOIN, told) == 404
    assert ask(bob, "/gradio_api/queue/data", query=b"session_hash=s1") == 404
    assert ask(bob, "/gradio_api/heartbeat/s1") == 404
    assert ask(ann, "/gradio_api/queue/data", query=b"x=1&session_hash=s1") == 200


def test_files_named_in_an_answer_become_the_users(cache):
    gate = Guard(None, rules(cache, accounts=True))
    ann = {"cookie": "access-token-id=t1"}
    answer = json.dumps({"path": f"{cache}/{'cd' * 32}/x.png"}).encode()
    status, _, _ = send_through(gate, JOIN, b"{}", ann, tokens={"t1": "ann"}, more=answer)
    assert status == 200
    assert ("ann", "cd" * 32) in gate._seen
