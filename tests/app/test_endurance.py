"""Many jobs on one server: it stays as large as it was."""

import io
import time

import httpx
import pytest
from PIL import Image

from tests.app.served import Served, Size, drawn

WARM, MIB = 6, 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("endurance"))
    yield server
    server.close()


def job(server, number, photo):
    """What one visitor does: look at the page, add and delete a photo, draw, ask for nonsense."""
    with httpx.Client(base_url=server.address, timeout=60) as web:
        assert web.get("/").status_code == 200
        (path,) = web.post("/gradio_api/upload", files={"files": ("a.png", photo)}).json()
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        text = call(web, "add_photos", [[file], ""])
        draft = text.partition('"draft": "')[2][:32]
        assert len(draft) == 32, text
        assert "deleted" in call(web, "delete_photos", [draft])
        assert drawn(web, 2, seed=number)[1].startswith("event: complete")
        assert "error" in call(web, "status", ["0" * 32])


def call(web, name, data):
    event = web.post(f"/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
    return web.get(f"/gradio_api/call/{name}/{event}").text


def settled(server) -> Size:
    """Its size when connections that were closed are gone."""
    time.sleep(2)
    return server.size()


def endure(server, row, count, first):
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "PNG")
    for number in range(WARM):
        job(server, first + number, buffer.getvalue())
    before = settled(server)
    for number in range(count):
        job(server, first + WARM + number, buffer.getvalue())
    after = settled(server)
    grown = (after.memory - before.memory) / MIB
    others = after.files - before.files - count  # besides the picture that each job was shown
    assert abs(after.descriptors - before.descriptors) <= 2
    assert abs(after.threads - before.threads) <= 2
    assert abs(others) <= 2
    assert grown <= 50
    row.cases(count)
    row.figure(
        f"descriptors {after.descriptors - before.descriptors:+d}, threads "
        f"{after.threads - before.threads:+d}, files {others:+d}, memory {grown:+.0f} MB"
    )


@pytest.mark.row("G7")
@pytest.mark.timeout(200)
def test_some_jobs_leave_nothing_behind(server, row):
    endure(server, row, 20, first=0)


@pytest.mark.full
@pytest.mark.row("G7")
@pytest.mark.timeout(600)
def test_many_jobs_leave_nothing_behind(server, row):
    endure(server, row, 200, first=1000)
