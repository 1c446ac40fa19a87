"""A crowd at the door: who is served, who is told to come back, whether the page still opens."""

import statistics
import threading
import time

import httpx
import pytest
from PIL import Image

from tests.app.served import Served, drawn

CLIENTS, ROUNDS = 32, 3
STEPS = 15  # of the tiny base: about half a second beside a training
SERVED = 9  # 8 wait and 1 is being drawn
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("crowd"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def training(server, tmp_path_factory):
    """A run that goes on through the test."""
    photo = tmp_path_factory.mktemp("photos") / "a.png"
    Image.radial_gradient("L").convert("RGB").save(photo)
    with httpx.Client(base_url=server.address, timeout=60) as web:
        files = {"files": ("a.png", photo.read_bytes())}
        (path,) = web.post("/gradio_api/upload", files=files).json()
        data = [[{"path": path, "meta": {"_type": "gradio.FileData"}}], ""]
        draft = answer(web, "add_photos", data)["draft"]
        settings = {"num_validation_photos": 0, "resolution": 32, "num_inference_steps": 2}
        run = answer(web, "train", [draft, "cat", "", "object", "quick", "tiny", 2000, 0, settings])
        end = time.monotonic() + 90
        while not answer(web, "status", [run])["step"]:
            assert time.monotonic() < end
            time.sleep(0.5)
        yield run
        answer(web, "stop", [run])


def answer(web, name, data):
    event = web.post(f"/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
    text = web.get(f"/gradio_api/call/{name}/{event}").text
    assert "event: complete" in text, text
    return httpx.Response(200, text=text[text.rindex("data: ") + 6 :]).json()[0]


def at_once(server, round):
    """What each of the clients got, and how long the page took to open meanwhile."""
    start, got = threading.Barrier(CLIENTS), []

    def visit(number):
        with httpx.Client(base_url=server.address, timeout=90) as web:
            start.wait()
            got.append(drawn(web, STEPS, seed=1000 * round + number))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(CLIENTS)]
    for visitor in visitors:
        visitor.start()
    delays = []
    with httpx.Client(base_url=server.address, timeout=90) as web:
        while any(visitor.is_alive() for visitor in visitors):
            delays.append(web.get("/config").elapsed.total_seconds())
            time.sleep(0.05)
    for visitor in visitors:
        visitor.join()
    return got, delays


@pytest.mark.row("G1")
@pytest.mark.timeout(280)
def test_a_crowd_is_served_in_turn_or_told_to_come_back(server, training, row):
    with httpx.Client(base_url=server.address, timeout=90) as web:
        assert drawn(web, 2)[1].startswith("event: complete")
    before, delays, served = server.size(), [], []
    for round in range(ROUNDS):
        got, waited = at_once(server, round)
        delays += waited
        served.append(sum(text.startswith("event: complete") for status, text in got))
        refused = [(status, text) for status, text in got if status != 200]
        assert len(refused) + served[-1] == CLIENTS, got
        assert all(status == 503 and "queue is full" in text.lower() for status, text in refused)
    assert all(abs(count - SERVED) <= 1 for count in served), served
    slow = statistics.quantiles(delays, n=20)[-1]
    assert slow <= 0.5, f"/config: p95 {slow:.2f} s"
    grown = server.size().memory - before.memory
    assert grown <= 50 * MIB
    row.cases(CLIENTS * ROUNDS)
    row.figure(
        f"served per round {', '.join(map(str, served))} of 32; page p95 {1000 * slow:.0f} ms; "
        f"memory {grown / MIB:+.0f} MB"
    )
