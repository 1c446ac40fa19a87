"""The Personalize tab: its one public event over HTTP, and its handlers on a really built page."""

import time
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from snell_diffusion.app import make_page
from snell_diffusion.app.fields import FIELDS
from snell_diffusion.app.form import Form
from snell_diffusion.app.tabs.listed import listed
from snell_diffusion.app.tabs.personalize_fields import differing, from_component, shown_values
from snell_diffusion.errors import SnellaValueError

NOBODY = SimpleNamespace(username=None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{index}.png" for index in range(4)]
    for index, path in enumerate(paths):
        Image.linear_gradient("L").rotate(30 * index).convert("RGB").save(path)
    return paths


@pytest.fixture(scope="module")
def client(page_server):
    client = Client(page_server.address, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def handlers(tiny_app):
    """The tab's handlers by name, from the built page."""
    page = make_page(tiny_app)
    found = {}
    for function in page.fns.values():
        module = getattr(function.fn, "__module__", "")
        if module.startswith("snell_diffusion.app.tabs.personalize"):
            found.setdefault(function.fn.__name__, []).append(function.fn)
    return found


@pytest.fixture
def draft(tiny_app, photos):
    return tiny_app.workspaces.of(None).drafts.add(photos).id


def answers(**changes):
    """What the boxes of the form hold: as in the handlers' inputs after the form itself."""
    basics = {"subject": "cat", "name": "", "kind": "pet", "effort": "quick", "base": "tiny"}
    basics |= {"steps": 2, "seed": 0}
    return list({**basics, **changes}.values())


def test_photos_come_in_through_one_public_event(client, photos, page_server):
    added = client.predict([handle_file(p) for p in photos[:2]], None, api_name="/add_photos")
    assert [p["name"] for p in added["photos"]] == ["0.png", "1.png"]
    assert added["problems"] == []
    assert added["notes"][0].startswith("Only 2 so far.")
    more = client.predict([handle_file(photos[2])], added["draft"], api_name="/add_photos")
    assert more["draft"] == added["draft"]
    assert len(more["photos"]) == 3
    stored = page_server.app.workspaces.of(None).drafts.get(added["draft"]).stored
    assert [photo.name for photo in stored] == ["0.png", "1.png", "2.png"]


def test_a_bad_photo_is_named_without_its_place(client, photos, tmp_path):
    page = tmp_path / "page.png"
    page.write_text("<html></html>")
    files = [handle_file(photos[0]), handle_file(page)]
    added = client.predict(files, None, api_name="/add_photos")
    assert added["problems"] == ["page.png is not a jpg, png or webp file, whatever its name says."]
    assert len(added["photos"]) == 1


@pytest.mark.parametrize("draft", ["../../etc", "0" * 32, "/etc/passwd"])
def test_only_own_drafts_are_added_to(client, photos, draft):
    with pytest.raises(AppError, match=r"add photos first|no longer there"):
        client.predict([handle_file(photos[0])], draft, api_name="/add_photos")


def test_a_file_of_the_server_is_no_upload(client):
    with pytest.raises((AppError, ValueError)):
        client.predict(
            [{"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}],
            None,
            api_name="/add_photos",
        )


def test_the_public_event_is_described_and_the_only_one(client):
    told = client.view_api(return_format="dict")["named_endpoints"]
    assert "Add photos of one subject" in told["/add_photos"]["description"]
    private = {"/added", "/choose", "/caption", "/begin", "/tuned", "/answered", "/checked"}
    assert not private & told.keys()


def test_loading_the_page_brings_back_the_latest_photos(handlers, draft):
    shown = handlers["load"][0]({}, NOBODY)
    assert shown[0]["draft"] == shown[1] == draft
    assert len(shown[3]["value"]) == 4
    assert shown[-1].selected == 1


def test_start_over_forgets_the_photos(handlers, draft, tiny_app):
    shown = handlers["over"][0](Form(draft, base="tiny").stored(), draft, NOBODY)
    assert shown[1]["draft"] is None
    assert shown[4]["visible"] is False
    with pytest.raises(SnellaValueError):
        tiny_app.workspaces.of(None).drafts.get(draft)


def test_a_photo_is_chosen_described_and_removed(handlers, draft, tiny_app):
    drafts = tiny_app.workspaces.of(None).drafts
    index, card, box = handlers["choose"][0](draft, NOBODY, SimpleNamespace(index=1))
    assert (index, card["visible"], box["label"]) == (1, True, "Caption of 1.png")
    handlers["caption"][0](draft, 1, "in the snow", NOBODY)
    assert drafts.photos(draft)[1].caption == "in the snow"
    gallery = handlers["described"][0](draft, 1, "on the beach", NOBODY)
    assert gallery[1][1] == "1.png: on the beach"
    shown = handlers["remove"][0](Form(draft, base="tiny").stored(), draft, 1, NOBODY)
    assert [photo.name for photo in drafts.photos(draft)] == ["0.png", "2.png", "3.png"]
    assert len(shown[3]["value"]) == 3
    with pytest.raises(gr.Error, match="there is no photo"):
        handlers["remove"][0](Form(draft, base="tiny").stored(), draft, None, NOBODY)


def test_a_missing_word_keeps_the_visitor_on_the_step(handlers, draft):
    kept = Form(draft, base="tiny").stored()
    with pytest.raises(gr.Error, match="one or two English words"):
        handlers["checked"][0](NOBODY, kept, *answers(subject=""))
    with pytest.raises(gr.Error, match="add photos first"):
        handlers["checked"][0](NOBODY, Form(base="tiny").stored(), *answers())
    assert handlers["checked"][0](NOBODY, kept, *answers())[0].selected == 3


def test_answers_change_what_is_shown(handlers, draft):
    words = next(f for f in handlers["answered"] if len(f(NOBODY, {}, *answers())) < 20)
    form, _, example, efforts, expected, changed, settings, command = words(
        NOBODY, Form(draft, base="tiny").stored(), *answers(name="Mika")
    )
    assert example == "a photo of a mika cat"
    assert form["name"] == "Mika"
    assert [value for _, value in efforts["choices"]] == ["quick", "balanced", "thorough"]
    assert "unknown before a first run" in expected
    assert changed == ""
    assert "max_train_steps: 2" in settings
    assert command.startswith("accelerate launch ")
    early = words(NOBODY, {}, *answers())[6]
    assert early.startswith("# Not complete yet: add photos first")


def test_a_changed_setting_is_shown_and_kept(handlers, draft):
    kept = Form(draft, base="tiny").stored()
    later = next(f for f in handlers["answered"] if len(f(NOBODY, {}, *answers())) > 20)
    boxes = later(NOBODY, kept, *answers())[-len(FIELDS) :]
    untouched = handlers["tuned"][0](NOBODY, kept, *answers(), *boxes)
    assert untouched[0]["overrides"] == {}
    boxes[list(FIELDS).index("rank")] = 8
    shown = handlers["tuned"][0](NOBODY, kept, *answers(), *boxes)
    assert shown[0]["overrides"] == {"rank": 8}
    assert "rank: 8" in shown[5]
    assert "rank: 8" in shown[6]
    again = later(NOBODY, shown[0], *answers(effort="thorough"))  # a change outlives the preset
    assert again[-len(FIELDS) :][list(FIELDS).index("rank")] == 8
    boxes[list(FIELDS).index("rank")] = 10**6
    with pytest.raises(gr.Error, match="at most 256"):
        handlers["tuned"][0](NOBODY, kept, *answers(), *boxes)


def test_a_run_starts_from_what_the_boxes_hold_and_a_new_page_shows_it(handlers, draft, tiny_app):
    jobs = tiny_app.workspaces.of(None).jobs
    kept = Form(draft, base="tiny").stored()
    later = next(f for f in handlers["answered"] if len(f(NOBODY, {}, *answers())) > 20)
    boxes = later(NOBODY, kept, *answers())[-len(FIELDS) :]
    changes = {"rank": 4, "num_inference_steps": 2, "validation_timesteps": 2}
    for name, value in changes.items():
        boxes[list(FIELDS).index(name)] = value
    job, step = handlers["begin"][0](NOBODY, kept, *answers(), *boxes)
    assert step.selected == 4
    loaded = handlers["load"][0](kept, NOBODY)
    assert (loaded[-2], loaded[-1].selected) == (job, 4)
    with pytest.raises(gr.Error, match="a run is going already"):
        handlers["begin"][0](NOBODY, kept, *answers(), *boxes)
    end = time.monotonic() + 240
    while jobs.alive(job):
        assert time.monotonic() < end
        time.sleep(0.3)
    status = jobs.status(job)
    assert (status.state, status.step) == ("finished", 2), status
    assert changes.items() <= jobs.settings(job).items()
    sheets = [step for step, _ in jobs.samples(job)]
    assert sheets == [0, 1, 2]
    assert any(event["event"] == "validation" for event in jobs.events(job))
    assert len(jobs.all()) == 1
    same = Form(draft, base="tiny", overrides=changes).stored()
    assert "from your last run" in later(NOBODY, same, *answers())[4]


def test_every_field_goes_into_its_component_and_back():
    defaults = {name: field.default for name, field in FIELDS.items()}
    shown = dict(zip(FIELDS, shown_values({}), strict=True))
    assert differing(shown, {}) == {}
    assert {name: from_component(FIELDS[name], value) for name, value in shown.items()} == defaults


@pytest.mark.parametrize(
    "name, value, setting",
    [
        ("sample_prompts", " a cat \n\na dog\n", ["a cat", "a dog"]),
        ("train_alpha", "on", True),
        ("train_alpha", "as usual", None),
        ("kernel", "as usual", None),
        ("initializer_token", "", None),
        ("rank", None, None),
    ],
)
def test_a_component_holds_what_people_type(name, value, setting):
    assert from_component(FIELDS[name], value) == setting


def test_an_emptied_box_is_asked_for():
    with pytest.raises(SnellaValueError, match="learning_rate is empty"):
        from_component(FIELDS["learning_rate"], None)


def test_names_of_files_are_no_html():
    shown = listed("Not taken", ["<img src=x onerror=alert(1)>.png is empty."], alert=True)
    assert "<img" not in shown
    assert 'role="alert"' in shown
    assert listed("Nothing", []) == ""
