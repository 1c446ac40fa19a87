"""Row G2: whoever cancels or vanishes frees the worker, leaves nothing half, and blocks nobody."""

import socket
import threading
import time

import pytest
from gradio_client import handle_file

from snell_diffusion.app import library, pipelines
from tests.app.adapters import adapter_file
from tests.app.visitor import Visitor, Wire

FREE = 2.0  # seconds until the worker must be free
LONG = {"generate_steps": 100, "generate_count": 8}


@pytest.fixture
def studio(page_server):
    studio = page_server.app.studio
    studio._pictures.clear()  # what is remembered would be there at once
    yield studio
    left = studio._running
    if left is not None:  # by a test that failed: nothing may draw while the process ends
        left.cancelled.set()
        wait_for(lambda: not studio.busy)
    assert left is None


@pytest.fixture
def visitor(page_server):
    visitor = Visitor(page_server.address)
    yield visitor
    visitor.close()


def wait_for(condition, seconds=60.0):
    """Seconds until a condition holds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)
    return time.monotonic() - begun


class Drawing:
    """A drawing that was started by the page's button and can be left in two ways."""

    def __init__(self, address, visitor, **changes):
        visitor.set(**changes)
        (self.dependency,) = [d for d in visitor.events("generate-draw", "click") if d["inputs"]]
        self.wire = Wire(address)
        values = [visitor.values[part] for part in self.dependency["inputs"]]
        self.event = self.wire.join(self.dependency["id"], values)
        self.stream = self.wire.listen()
        self.messages = []
        answer = self.stream.__enter__()
        self._line = answer.extensions["network_stream"].get_extra_info("socket")
        self._lines = answer.iter_lines()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            self.messages.extend(line for line in self._lines if line)
        except Exception:  # the stream was closed under it
            return

    def leave(self, way):
        if way == "button":
            self.wire.cancel(self.dependency["id"], self.event)
        else:  # a client's own close waits for the next message
            self._line.shutdown(socket.SHUT_RDWR)


def stepping(studio):
    return studio.busy and studio._running.done > 3


def between_pictures(studio):
    return studio.busy and studio._running.done > 101


WAYS = pytest.mark.parametrize("way", ["button", "vanish"])


def freed(studio, leave):
    leave()
    took = wait_for(lambda: not studio.busy, FREE)
    studio._worker.join(0.2)
    assert studio._worker.is_alive()  # or the next visitor would wait in vain
    return took


def draws(visitor):
    """Whether the next visitor gets a picture."""
    visitor.set(generate_steps=2, generate_count=1)
    return bool(visitor.press("generate-draw")["generate-gallery"]["value"])


@pytest.mark.row("G2")
@WAYS
@pytest.mark.parametrize("moment", [stepping, between_pictures])
def test_a_drawing_ends_in_its_steps_and_between_pictures(
    page_server, studio, visitor, moment, way, row
):
    drawing = Drawing(page_server.address, visitor, **LONG)
    wait_for(lambda: moment(studio))
    took = freed(studio, lambda: drawing.leave(way))
    assert draws(visitor)
    row.figure(f"worker free after {took:.2f} s")


@pytest.mark.row("G2")
@WAYS
def test_a_drawing_ends_while_its_base_is_loaded(
    page_server, studio, visitor, way, row, monkeypatch
):
    loading, load = threading.Event(), pipelines.load

    def slow(base):
        loading.set()
        time.sleep(0.5)
        return load(base)

    studio._drop()
    monkeypatch.setattr(pipelines, "load", slow)
    drawing = Drawing(page_server.address, visitor, **LONG)
    assert loading.wait(60)
    took = freed(studio, lambda: drawing.leave(way))
    assert draws(visitor)
    row.figure(f"worker free after {took:.2f} s")


@pytest.mark.row("G2")
@WAYS
def test_a_queued_drawing_is_never_begun(page_server, studio, visitor, way, row, monkeypatch):
    begun = []
    plan = studio.plan
    monkeypatch.setattr(studio, "plan", lambda *given: begun.append(given[0].seed) or plan(*given))
    first = Drawing(page_server.address, visitor, generate_seed=1, **LONG)
    wait_for(lambda: stepping(studio))
    second = Drawing(page_server.address, visitor, generate_seed=2, **LONG)
    time.sleep(0.3)
    second.leave(way)
    time.sleep(1.0)  # the server looks for closed lines now and then
    assert studio.busy  # the first goes on
    took = freed(studio, lambda: first.leave("button"))
    assert draws(visitor)
    assert begun[0] == 1
    assert begun.count(2) == 1  # only by the visitor's own last picture, whose seed is still 2
    row.figure(f"worker free after {took:.2f} s")


@pytest.mark.row("G2")
@WAYS
def test_an_upload_that_is_left_while_it_is_stored_is_listed_whole_or_not_at_all(
    page_server, studio, visitor, way, row, monkeypatch, tmp_path
):
    shelf = page_server.app.workspaces.of(None).library
    saving, replace = threading.Event(), library._replace

    def slow(path, content):
        if path.suffix == ".json":
            saving.set()
            time.sleep(0.5)
        replace(path, content)

    monkeypatch.setattr(library, "_replace", slow)
    path = adapter_file(tmp_path / "left.safetensors", seed=41 if way == "button" else 42)
    job = visitor.client.submit(handle_file(path), api_name="/add_adapter")
    assert saving.wait(60)
    assert all(adapter.label != "left (uploaded)" for adapter in shelf.all())
    if way == "button":
        job.cancel()
    else:
        visitor.client.close()
    wait_for(lambda: len(list(shelf.root.glob("*.json"))) == len(list(shelf.root.glob("*.saf*"))))
    for adapter in shelf.all():
        assert adapter.path.read_bytes() == path.read_bytes()
        shelf.delete(adapter.id)
    assert list(shelf.root.iterdir()) == []
    another = Visitor(page_server.address)
    assert draws(another)
    another.close()
