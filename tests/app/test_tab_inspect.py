"""The Inspect tab: what its events answer, over a real library and a real page."""

from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image

from snell_diffusion.app.shared import Shared
from snell_diffusion.app.tabs.inspect import EMPTY, HEADINGS, NO_PAIR, InspectTab, table
from snell_diffusion.errors import SnellaValueError
from tests import tiny_models

OWNER = SimpleNamespace(username=None)


@pytest.fixture(scope="module")
def tab(tiny_app):
    with gr.Blocks(analytics_enabled=False) as page:
        wanted = gr.State(None)
        with gr.Tabs() as tabs, gr.Tab("Inspect"):
            return InspectTab(Shared(tiny_app, page, tabs, wanted))


@pytest.fixture(scope="module")
def adapters(tiny_app, tmp_path_factory):
    """Ids of two uploaded adapters; the name of one is a trap for the page."""
    folder, ids = tmp_path_factory.mktemp("files"), []
    for seed, name in ((1, "<b>one"), (2, "two")):
        pipe = tiny_models.pipeline()
        tiny_models.adapt(pipe.unet, seed=seed)
        path = pipe.save_snella_weights(folder / f"{seed}.safetensors")
        ids.append(tiny_app.workspaces.of(None).library.add(path, name).id)
    return ids


def test_an_adapter_is_shown_and_measured(tab, adapters):
    facts, picture, rows, _, _ = tab._show(OWNER, adapters[0])
    assert "&lt;b&gt;one (uploaded)" in facts
    assert "<b>one" not in facts
    assert "Digest check" in facts
    assert isinstance(picture, Image.Image)
    assert all(len(row) == len(HEADINGS) and row[-1] is None for row in rows)
    sizes, text, measured = tab._measure(OWNER, adapters[0])
    assert isinstance(sizes, Image.Image)
    assert "The whole update is" in text
    assert [row[:5] for row in measured] == [row[:5] for row in rows]
    assert all(row[-1] > 0 for row in measured)


def test_two_adapters_are_compared(tab, adapters):
    text, picture, rows = tab._compare(OWNER, *adapters)
    assert "Of the weights that either changes" in text
    assert picture["visible"]
    assert all(0 <= row[2] <= 1 for row in rows)
    assert "twice" in tab._compare(OWNER, adapters[0], adapters[0])[0]
    assert tab._compare(OWNER, adapters[0], "")[0] == NO_PAIR
    assert tab._show(OWNER, "")[0] == EMPTY


@pytest.mark.parametrize("forged", ["../../etc/passwd", "0" * 32, ["x"], {"path": "/etc"}, 7])
def test_only_adapters_of_the_list_are_opened(tab, forged):
    for ask in (tab._show, tab._measure):
        with pytest.raises(SnellaValueError, match="choose"):
            ask(OWNER, forged)
    with pytest.raises(SnellaValueError, match="choose"):
        tab._compare(OWNER, forged, "x")


def test_lists_are_refreshed_and_keep_what_is_still_there(tab, adapters):
    first, second = tab._refresh(OWNER, adapters[0], "f" * 32)
    assert first["value"] == adapters[0]
    assert second["value"] == ""
    assert {name for _, name in first["choices"]} == {"", *adapters}
    nobody = tab._refresh(SimpleNamespace(username="bob"), adapters[0], "")
    assert [update["value"] for update in nobody] == ["", ""]


def test_an_upload_is_checked_before_it_is_listed(tab, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no")
    with pytest.raises(SnellaValueError, match=r"not a whole \.safetensors file"):
        tab._add(OWNER, str(bad))


def test_events_of_the_tab_are_private(tab):
    rows = tab.shared.page.fns.values()
    assert rows
    assert all(row.api_visibility == "private" for row in rows)


def test_what_a_file_says_stays_text():
    assert "<script>" not in table([("<script>", "<img src=x>")])
