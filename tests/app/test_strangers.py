"""Two people on one server, and pages of other sites in their browsers."""

import json
import re
from types import SimpleNamespace

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from snell_diffusion.app import launch, make_page
from snell_diffusion.app.options import Options
from snell_diffusion.app.server import CACHE
from tests import tiny_models

ACCOUNTS = {"ann": "correct horse", "bob": "battery staple"}


@pytest.fixture(scope="module")
def address(tiny_app):
    page = make_page(tiny_app)
    yield launch(page, Options(accounts=ACCOUNTS), wait=False)
    page.close()


@pytest.fixture(scope="module")
def people(address):
    clients = {
        name: Client(address, auth=(name, word), verbose=False) for name, word in ACCOUNTS.items()
    }
    yield clients
    for client in clients.values():
        client.close()


@pytest.fixture
def bob(address):
    """Bob's browser, signed in."""
    with httpx.Client(base_url=address, timeout=20) as web:
        answer = web.post("/login", data={"username": "bob", "password": ACCOUNTS["bob"]})
        assert answer.status_code == 200
        yield web


@pytest.fixture(scope="module")
def hers(tiny_app, people, tmp_path_factory):
    """Ids of what Ann has: a draft, an adapter, a run; and a file that she was shown."""
    folder = tmp_path_factory.mktemp("ann")
    Image.radial_gradient("L").convert("RGB").save(folder / "face.png")
    ann = people["ann"]
    draft = ann.predict([handle_file(folder / "face.png")], "", api_name="/add_photos")["draft"]
    pipe = tiny_models.pipeline()
    tiny_models.adapt(pipe.unet)
    path = handle_file(pipe.save_snella_weights(folder / "hers.safetensors"))
    adapter = ann.predict(path, api_name="/add_adapter")["id"]
    run = tiny_app.workspaces.of("ann").jobs.new()
    record = {"label": "her run", "started": 1.0, "pid": 0, "created": 0.0, "ended": 2.0}
    (tiny_app.workspaces.of("ann").jobs.folder(run) / "job.json").write_text(json.dumps(record))
    ann.predict(adapter, api_name="/adapter_file")
    cache = tiny_app.workspaces.root / CACHE
    files = {path.name: str(path) for path in cache.glob("*/*") if path.is_file()}
    upload = files["face.png"]
    stored = next(path for name, path in files.items() if name.endswith(".safetensors"))
    return SimpleNamespace(draft=draft, adapter=adapter, run=run, upload=upload, stored=stored)


ATTEMPTS = {
    "photos": lambda ann: (ann.draft,),
    "captions": lambda ann: (ann.draft, ["x"]),
    "delete_photos": lambda ann: (ann.draft,),
    "train": lambda ann: (ann.draft, "cat", "", "object", "quick", "tiny"),
    "status": lambda ann: (ann.run,),
    "delete_run": lambda ann: (ann.run,),
    "inspect": lambda ann: (ann.adapter,),
    "adapter_file": lambda ann: (ann.adapter,),
    "generate": lambda ann: ("a cat", "tiny", [[ann.adapter, 1.0]]),
}


@pytest.mark.row("G6")
@pytest.mark.parametrize("endpoint", ATTEMPTS)
def test_ids_of_somebody_else_name_nothing(people, hers, endpoint, row):
    arguments = ATTEMPTS[endpoint](hers)
    with pytest.raises(AppError, match="no longer there") as error:
        people["bob"].predict(*arguments, api_name=f"/{endpoint}")
    assert "/" not in str(error.value)
    row.figure("no id, file or session of another user was of use")


@pytest.mark.row("G6")
def test_files_that_somebody_else_was_shown_are_not_there(address, bob, hers):
    with httpx.Client(base_url=address) as ann:
        ann.post("/login", data={"username": "ann", "password": ACCOUNTS["ann"]})
        for path in (hers.upload, hers.stored):
            assert ann.get(f"/gradio_api/file={path}").status_code == 200
            answer = bob.get(f"/gradio_api/file={path}")
            assert (answer.status_code, "reload" in answer.text) == (404, True)
            assert httpx.get(f"{address}gradio_api/file={path}").status_code == 401


@pytest.mark.row("G6")
def test_uploads_of_somebody_else_cannot_be_used(bob, hers):
    file = {"path": hers.upload, "meta": {"_type": "gradio.FileData"}}
    answer = bob.post("/gradio_api/call/add_photos", json={"data": [[file], ""]})
    assert answer.status_code == 404


@pytest.mark.row("G6")
def test_sessions_of_somebody_else_cannot_be_joined_or_ended(people, bob):
    ann = people["ann"]
    ann.predict(api_name="/bases")
    session = ann.session_hash
    body = {"session_hash": session, "fn_index": 0, "event_id": "x"}
    assert bob.post("/gradio_api/cancel", json=body).status_code == 404
    assert bob.post("/gradio_api/queue/join", json={**body, "data": []}).status_code == 404
    assert bob.get("/gradio_api/queue/data", params={"session_hash": session}).status_code == 404
    assert bob.get(f"/gradio_api/heartbeat/{session}").status_code == 404


def test_lists_hold_only_what_is_ones_own(people, hers):
    ann, bob = people["ann"], people["bob"]
    assert [row["id"] for row in ann.predict(api_name="/adapters")] == [hers.adapter]
    assert [row["id"] for row in ann.predict(api_name="/runs")] == [hers.run]
    assert bob.predict(api_name="/adapters") == bob.predict(api_name="/runs") == []


def test_before_signing_in_there_is_a_page_to_sign_in_and_nothing_else(address):
    with httpx.Client(base_url=address) as web:
        page = web.get("/")
        assert page.status_code == 200
        assert '"auth_required":true' in page.text.replace(" ", "")
        assert "personalize" not in re.sub(r"gradio_api_info.*?</script>", "", page.text).lower()
        for path in ("config", "gradio_api/queue/data?session_hash=x", "gradio_api/queue/status"):
            assert web.get(f"/{path}").status_code == 401
        for path in ("upload", "call/bases", "queue/join", "cancel"):
            assert web.post(f"/gradio_api/{path}", json={}).status_code == 401
        wrong = web.post("/login", data={"username": "ann", "password": "x"})
        assert (wrong.status_code, wrong.json()["detail"]) == (400, "Incorrect credentials.")


FOREIGN = "https://evil.example"
JOIN = {"data": [], "fn_index": 0, "session_hash": "x"}
FROM_ELSEWHERE = {
    "an upload": ("POST", "upload", {"Origin": FOREIGN}, {"files": {"files": ("a.png", b"x")}}),
    "a call": ("POST", "queue/join", {"Origin": FOREIGN}, {"json": JOIN}),
    "a page without an address": ("POST", "queue/join", {"Origin": "null"}, {"json": JOIN}),
    "another port here": ("POST", "queue/join", {"Origin": "http://127.0.0.1:1"}, {"json": JOIN}),
    "a name that was rebound": ("GET", "info", {"Host": "evil.example:7860"}, {}),
    "a picture in a page": ("GET", "file=x", {"Sec-Fetch-Site": "cross-site"}, {}),
}


@pytest.mark.row("G8")
@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_other_sites_get_nothing_done(tiny_app, bob, name, row):
    method, call, headers, content = FROM_ELSEWHERE[name]
    cache = tiny_app.workspaces.root / CACHE
    before = sorted(cache.rglob("*"))
    answer = bob.request(method, f"/gradio_api/{call}", headers=headers, **content)
    assert answer.status_code == 403
    assert "open" in answer.json()["error"]
    assert sorted(cache.rglob("*")) == before
    row.figure("all foreign requests answered 403, nothing stored")
