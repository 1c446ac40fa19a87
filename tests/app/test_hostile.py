"""Requests that no page would send: none reads, writes, fetches or tells what it should not."""

import http.server
import io
import json
import threading
import uuid
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def canary():
    """(address, requests) of a server of this machine that nobody is to reach."""
    reached = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            reached.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", reached
    server.shutdown()
    server.server_close()


@pytest.fixture
def web(page_server, canary, monkeypatch):
    """A client that checks of every answer that it tells no place and no token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def check(response):
        text = response.read().decode("utf-8", "replace")
        assert response.status_code < 500
        for secret in (str(page_server.root / "local"), str(ROOT), TOKEN, "Traceback", "root:x:"):
            assert secret not in text, text

    hooks = {"response": [check]}
    with httpx.Client(base_url=page_server.address, timeout=20, event_hooks=hooks) as client:
        yield client
    assert canary[1] == []


@pytest.fixture(autouse=True)
def nothing_is_touched(page_server, tmp_path):
    """The workspace and a file beside it stay as they are."""
    beside = page_server.root.parent / "beside.txt"
    beside.write_text("untouched")

    def state():
        paths = sorted((page_server.root / "local").rglob("*"))
        return [(path, path.stat().st_mtime_ns) for path in paths if path.is_file()]

    before = state()
    yield
    assert beside.read_text() == "untouched"
    assert state() == before


def call(web, name, data):
    """What an endpoint answers: ("refused", status) or the last event and its value."""
    asked = web.post(f"/gradio_api/call/{name}", json={"data": data})
    if asked.status_code != 200:
        return "refused", asked.json()
    lines = web.get(f"/gradio_api/call/{name}/{asked.json()['event_id']}").text.split("\n")
    event = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")][-1]
    value = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")][-1]
    return event, json.loads(value)


def require_sentence(answer):
    event, value = answer
    text = json.dumps(value)
    assert event in ("refused", "error"), answer
    assert isinstance(value, dict), answer
    assert len(value["error"].split()) > 3, text


FILES = (
    "/etc/passwd",
    "/proc/self/environ",
    "../../../../etc/passwd",
    "%2e%2e/%2e%2e/etc/passwd",
    "..%2f..%2fetc/passwd",
    "{root}/local/private.txt",
    "{cache}/../local/private.txt",
    "pyproject.toml",
)


@pytest.mark.row("G4")
@pytest.mark.parametrize("path", FILES)
def test_addresses_of_files(page_server, web, path):
    own = page_server.root / "local" / "private.txt"
    own.parent.mkdir(exist_ok=True)
    if not own.exists():
        own.write_text("secret")
    place = path.format(root=page_server.root, cache=page_server.root / "cache")
    answer = web.get(f"/gradio_api/file={place}")
    assert answer.status_code in (403, 404)
    own.unlink()


PATHS = (
    "/etc/passwd",
    "/proc/self/environ",
    str(ROOT / "pyproject.toml"),
    "pyproject.toml",
    "~/.ssh/id_rsa",
    "../../etc/passwd",
)


@pytest.mark.row("G4")
@pytest.mark.parametrize("path", PATHS)
def test_files_of_the_server_as_uploads(web, path):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    require_sentence(call(web, "add_photos", [[file], ""]))
    require_sentence(call(web, "add_adapter", [file]))


SSRF = (
    lambda web, there: call(web, "add_photos", [[{"path": f"{there}/a.png"}], ""]),
    lambda web, there: call(
        web, "add_adapter", [{"path": f"{there}/a", "meta": {"_type": "gradio.FileData"}}]
    ),
    lambda web, there: call(web, "add_photos", [[{"url": f"{there}/a.png", "path": ""}], ""]),
    lambda web, there: call(web, "add_photos", [[{"path": there.removeprefix("http:")}], ""]),
    lambda web, there: ("refused", web.get(f"/gradio_api/file={there}/a.png").json()),
    lambda web, there: ("refused", web.get(f"/gradio_api/proxy={there}/a.png").json()),
)


@pytest.mark.row("G4")
@pytest.mark.parametrize("form", range(len(SSRF)))
def test_addresses_that_the_server_would_fetch(web, canary, form):
    require_sentence(SSRF[form](web, canary[0]))
    assert canary[1] == []


NAMES = (
    "../../../tmp/x.png",
    "..\\..\\x.png",
    "/etc/cron.d/x.png",
    "x.png\x00.sh",
    ".ssh",
    "a" * 400 + ".png",
    "%2e%2e%2fx.png",
    "\u202egnp.exe",
    "x\nSet-Cookie: a=b.png",
    "<img src=x onerror=alert(1)>.png",
)


@pytest.mark.row("G4")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_uploads(page_server, web, name):
    buffer = io.BytesIO()
    Image.radial_gradient("L").save(buffer, "PNG")
    # httpx would escape the name, so the body is written by hand
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + buffer.getvalue() + b"\r\n--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = web.post("/gradio_api/upload", content=body, headers=kind)
    if answer.status_code != 200 or not answer.json():
        return
    (path,) = answer.json()
    cache = page_server.root / "cache"
    assert Path(path).resolve().parent.parent == cache
    event, value = call(web, "photos", ["0" * 32])
    assert event == "error"
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event, value = call(web, "add_photos", [[file], ""])
    if event == "complete":
        assert all(photo["name"].isprintable() for photo in value[0]["photos"])
        assert "/" not in "".join(photo["name"] for photo in value[0]["photos"])
        assert call(web, "delete_photos", [value[0]["draft"]])[0] == "complete"


VALUES = (
    {"seed": 2**70},
    {"steps": 10**9},
    {"width": -8},
    {"count": 10**6},
    {"guidance": 1e300},
    {"sparsity": -1},
)


@pytest.mark.row("G4")
@pytest.mark.parametrize("values", VALUES, ids=lambda values: next(iter(values)))
def test_values_out_of_range(web, values):
    names = "prompt base adapters negative_prompt seed steps guidance width height count sparsity"
    usual = {"prompt": "x", "base": "tiny", "negative_prompt": "", "seed": 0, "count": 1}
    data = [{**usual, **values}.get(name) for name in names.split()]
    require_sentence(call(web, "generate", [*data, False]))


FORGED = ("../../../etc/passwd", "0" * 32, {"path": "x"}, ["a", "b"])


@pytest.mark.row("G4")
@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_forged_ids_in_events_of_the_page(web, forged):
    config = web.get("/config").json()
    known = {row["props"].get("elem_id"): row["id"] for row in config["components"]}
    events = [
        row["id"] for row in config["dependencies"] if row["inputs"] == [known["inspect-adapter"]]
    ]
    assert len(events) == 2
    for event in events:
        session = uuid.uuid4().hex
        body = {"data": [forged], "fn_index": event, "session_hash": session}
        answer = web.post("/gradio_api/queue/join", json=body)
        if answer.status_code == 400:
            continue
        with web.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
            text = stream.read().decode()
        assert '"success":false' in text


@pytest.mark.row("G4")
@pytest.mark.parametrize(
    "body, status",
    [(b'{"data":["' + b"x" * 30 * 2**20 + b'"]}', 413), (b"[" * 50_000 + b"]" * 50_000, 400)],
    ids=["large", "deep"],
)
def test_huge_and_deep_bodies(web, row, body, status):
    for turn in range(5):
        if turn == 1:  # the client's own buffers are there by now
            memory = psutil.Process().memory_info().rss
        answer = web.post(
            "/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == status
        assert answer.elapsed.total_seconds() < 2
    assert psutil.Process().memory_info().rss - memory < 20 * 2**20
    row.figure("no path, token or traceback in a reply; nothing fetched, read or written")
