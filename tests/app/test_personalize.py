"""From a request to a run: what is refused, the settings, the YAML and the command, the start."""

import json
import shlex
import sys
from dataclasses import replace

import pytest
import yaml
from PIL import Image

from snell_diffusion.app import jobs as jobs_module
from snell_diffusion.app.bases import Bases
from snell_diffusion.app.form import Form, as_word, preset_of, request_of, restored, typed
from snell_diffusion.app.personalize import (
    captions_of,
    command_of,
    make_request,
    prompt_of,
    settings_of,
    start,
    yaml_of,
)
from snell_diffusion.app.studio import Studio
from snell_diffusion.app.workspace import App, Workspaces
from snell_diffusion.diffusion.config_files import parse_config
from snell_diffusion.errors import SnellaError, SnellaValueError

BASES = Bases.of()
EMBEDDED = BASES.get("embedded")
WAITS = "import time; time.sleep(60)"


@pytest.fixture
def app(tmp_path, monkeypatch):
    """An app whose training script only waits; its children are ended afterwards."""
    script = tmp_path / "train.py"
    script.write_text(WAITS)
    made = App(Workspaces(tmp_path / "runs", script, bases=BASES), Studio(BASES))
    monkeypatch.setattr("snell_diffusion.app.jobs.launch_command", _plain)
    yield made
    for name in (None, "other"):
        jobs = made.workspaces.of(name).jobs
        for job in jobs.all():
            monkeypatch.setattr(jobs_module.processes, "GRACE", 0.1)
            jobs_module.processes.end(jobs._config(job), 0.1)


def _plain(script, config, resume=False):
    return [sys.executable, str(script), "--config", str(config)]


@pytest.fixture
def workspace(app):
    return app.workspaces.of(None)


@pytest.fixture
def draft(workspace, tmp_path):
    """Id of five different photos."""
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for index, path in enumerate(paths):
        Image.linear_gradient("L").rotate(30 * index).convert("RGB").save(path)
    return workspace.drafts.add(paths).id


def request(draft, **more):
    return make_request(**{"draft": draft, "subject": "cat", "preset": "pet", **more})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"draft": "../../etc"}, "add photos first"),
        ({"draft": None}, "add photos first"),
        ({"subject": ""}, "one or two English words"),
        ({"subject": "cat\nseed: 3"}, "one or two English words"),
        ({"subject": "../cat"}, "one or two English words"),
        ({"subject": 7}, "one or two English words"),
        ({"word": "<a b>"}, "its name must be a short word"),
        ({"word": "x; rm"}, "its name must be a short word"),
        ({"preset": "animal"}, "choose what it is: pet, object, style"),
        ({"effort": "endless"}, "quick, balanced or thorough"),
        ({"steps": 0}, "the steps must be a whole number, 1 to 2000"),
        ({"steps": 2001}, "the steps must be"),
        ({"steps": 2.0}, "the steps must be"),
        ({"steps": True}, "the steps must be"),
        ({"seed": -1}, "the seed must be"),
        ({"seed": 2**40}, "the seed must be"),
        ({"overrides": {"output_dir": "/etc"}}, "cannot be changed here: 'output_dir'"),
        ({"overrides": {"rank": 0}}, "rank must be at least 1"),
        ({"overrides": "rank"}, "changed settings must be given by name"),
        ({"output_dir": "/etc"}, "output_dir is not asked for"),
        ({"subject": "", "seed": -1}, r"one or two English words.*; the seed must be"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(wrong, message):
    with pytest.raises(SnellaValueError, match=message):
        make_request(**{"draft": "0" * 32, "subject": "cat", **wrong})


def test_the_settings_are_the_presets_with_the_words(workspace, draft):
    values = settings_of(workspace, request(draft, subject=" Red Cat ", effort="quick"), EMBEDDED)
    assert values["instance_prompt"] == "a photo of a <my-red-cat> red cat"
    assert values["class_prompt"] == "a photo of a red cat"
    assert values["new_tokens"] == ["<my-red-cat>"]
    assert values["max_train_steps"] == 45
    assert values["num_validation_photos"] == 1
    assert values["sample_prompts"][1] == "a photo of a <my-red-cat> red cat in the snow"
    assert (values["instance_data_dir"], values["output_dir"]) == ("photos", "output")


def test_a_rare_word_is_no_new_token(workspace, draft):
    values = settings_of(workspace, request(draft, word="sks"), EMBEDDED)
    assert values["instance_prompt"] == "a photo of a sks cat"
    assert "new_tokens" not in values


def test_a_new_word_starts_as_the_class_word_where_that_is_better(workspace, draft):
    for base, preset, start_as in (
        ("embedded-dit", "pet", "cat"),
        ("embedded-dit", "style", None),
        ("embedded", "pet", None),
    ):
        asked = request(draft, preset=preset, base=base)
        values = settings_of(workspace, asked, BASES.get(base))
        assert values.get("initializer_token") == start_as


def test_changes_win_over_the_preset(workspace, draft):
    changes = {"rank": 8, "sample_prompts": ["a cat"], "target_sparsity": 0.9}
    values = settings_of(workspace, request(draft, overrides=changes, steps=7, seed=3), EMBEDDED)
    assert changes.items() <= values.items()
    assert (values["max_train_steps"], values["seed"]) == (7, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": 1024}, "at most 128 pixels, in multiples of 8; .* ask for 1024"),
        ({"resolution": 60}, "multiple of 8 pixels, got 60"),
        ({"aspect_ratio_buckets": "64,4096"}, "at most 128 pixels.*ask for 4096"),
        ({"aspect_ratio_buckets": "lots"}, "these settings: aspect_ratio_buckets should be"),
        ({"num_validation_photos": 5}, "5 of 5 photos would be held out"),
        ({"early_stopping_patience": 2, "num_validation_photos": 0}, "early_stopping_patience"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(workspace, draft, changes, message):
    with pytest.raises(SnellaError, match=message):
        settings_of(workspace, request(draft, overrides=changes), EMBEDDED)


def test_captions_name_the_surroundings(workspace, draft):
    workspace.drafts.caption(draft, 0, "on a wooden floor")
    workspace.drafts.caption(draft, 1, "a close-up of the <my-cat> cat")
    captions = captions_of(workspace, request(draft), EMBEDDED)
    assert captions[:3] == [
        "a photo of a <my-cat> cat on a wooden floor",
        "a close-up of the <my-cat> cat",
        None,
    ]
    style = request(draft, preset="style", subject="print")
    assert captions_of(workspace, style, EMBEDDED)[0] == "on a wooden floor in <my-print> style"


def test_a_place_that_all_photos_share_is_in_the_class_prompt_too(workspace, draft):
    for index in range(5):
        workspace.drafts.caption(draft, index, "on a wooden floor")
    values = settings_of(workspace, request(draft), EMBEDDED)
    assert values["class_prompt"] == "a photo of a cat on a wooden floor"
    workspace.drafts.caption(draft, 0, "in the snow")
    assert settings_of(workspace, request(draft), EMBEDDED)["class_prompt"] == "a photo of a cat"


@pytest.mark.parametrize("kind", ["pet", "object", "style"])
def test_the_yaml_and_the_command_are_what_the_command_line_takes(
    app, workspace, draft, kind, tmp_path, monkeypatch
):
    workspace.drafts.caption(draft, 0, "in the snow: #1")
    asked = request(draft, preset=kind, overrides={"rank": 8}, seed=3)
    text = yaml_of(workspace, asked, EMBEDDED)
    words = shlex.split(command_of())
    assert words[:2] == ["accelerate", "launch"]
    script = words.index("train_dreambooth_snella.py")
    (tmp_path / "settings.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = parse_config(words[script + 1 :])
    assert (config.rank, config.seed, config.instance_data_dir) == (8, 3, "photos")
    job = start(app, workspace, asked)
    used = workspace.jobs.settings(job)
    shown = yaml.safe_load(text)
    places = {"instance_data_dir", "output_dir"}
    assert {k: v for k, v in used.items() if k not in places} == {
        k: v for k, v in shown.items() if k not in places
    }
    caption = (workspace.jobs.folder(job) / "photos" / "photo-00.txt").read_text()
    assert f"# photo-00.txt beside photo-00.png: {caption}\n" in text


def test_an_exposed_page_shows_no_place_of_the_server(workspace, draft, tiny_base):
    base = replace(EMBEDDED, id="mine", source=str(tiny_base))
    asked = request(draft)
    assert str(tiny_base) in yaml_of(workspace, asked, base)
    text = yaml_of(workspace, asked, base, exposed=True)
    assert "/" not in text.replace("train_dreambooth_snella.py", "")
    assert "pretrained_model_name_or_path: mine" in text


def test_a_started_run_has_copies_of_photos_and_captions(app, workspace, draft):
    workspace.drafts.caption(draft, 2, "in the snow")
    workspace.drafts.remove(draft, 0)
    job = start(app, workspace, request(draft, effort="quick"))
    folder = workspace.jobs.folder(job)
    assert sorted(path.name for path in (folder / "photos").iterdir()) == [
        *("photo-00.png", "photo-01.png", "photo-01.txt", "photo-02.png", "photo-03.png"),
    ]
    assert workspace.jobs.settings(job)["instance_data_dir"] == str(folder / "photos")
    info = json.loads((folder / "job.json").read_text())
    assert info["label"] == "cat, 4 photos, 45 steps"
    wanted = {
        "subject": "cat",
        "word": "<my-cat>",
        "prompt": "a photo of a <my-cat> cat",
        "preset": "pet",
        "effort": "quick",
        "base": "embedded",
        "photos": 4,
    }
    assert wanted.items() <= info["facts"].items()


@pytest.mark.parametrize(
    "more",
    [
        {"draft": "0" * 32},
        {"base": "../embedded"},
        {"overrides": {"resolution": 1024}},
    ],
)
def test_a_refused_start_leaves_nothing_behind(app, workspace, draft, more):
    with pytest.raises(SnellaError):
        start(app, workspace, request(**{"draft": draft, **more}))
    assert list(workspace.jobs.root.glob("*")) == []


def test_a_start_that_fails_late_leaves_nothing_behind(app, workspace, draft):
    workspace.jobs.script.unlink()
    with pytest.raises(SnellaError, match="needs a checkout"):
        start(app, workspace, request(draft))
    assert list(workspace.jobs.root.glob("*")) == []
    assert len(workspace.drafts.get(draft).stored) == 5


def test_no_run_starts_while_another_users_trains(app, workspace, draft, tmp_path):
    start(app, workspace, request(draft))
    other = app.workspaces.of("other")
    theirs = other.drafts.add([tmp_path / "0.png"]).id
    with pytest.raises(SnellaValueError, match="a run is going already"):
        start(app, other, request(theirs))
    assert list(other.jobs.root.glob("*")) == []
    with pytest.raises(SnellaValueError, match="no longer there"):  # and not with our photos
        settings_of(other, request(draft), EMBEDDED)


@pytest.mark.parametrize(
    "kept", [None, 7, {"draft": 3, "kind": ["pet"], "base": "/etc", "steps": True, "seed": "x"}]
)
def test_a_form_from_nowhere_is_an_empty_one(kept):
    assert restored(kept, BASES) == Form(base="embedded")


def test_a_form_comes_back_from_the_browser(draft):
    form = Form(draft, "cat", "Mika", "pet", "quick", "embedded-dit", 5, 3, {"rank": 8})
    assert restored(json.loads(json.dumps(form.stored())), BASES) == form
    old = {**form.stored(), "overrides": {"rank": 8, "gone": 1, "seed": 3, "heads": -1}}
    assert restored(old, BASES) == form


def test_a_form_becomes_a_request(draft):
    form = typed(Form(draft, base="embedded"), {"subject": "cat", "name": "Mika", "seed": None})
    asked = request_of(form, BASES)
    assert prompt_of(asked, EMBEDDED) == "a photo of a <mika> cat"
    assert (asked.seed, asked.steps, asked.preset) == (0, None, "object")


@pytest.mark.parametrize(
    "name, word",
    [("", None), (" Mika ", "<mika>"), ("<mika>", "<mika>"), ("old red_cup", "<old-red-cup>")],
)
def test_a_name_becomes_a_new_word_on_the_shipped_bases(name, word):
    assert as_word(name, EMBEDDED) == word


def test_a_name_is_a_rare_word_on_other_bases():
    assert as_word("Mika", replace(EMBEDDED, id="sdxl")) == "mika"


def test_the_preset_of_a_form_is_there_before_its_words(workspace, draft):
    empty = preset_of(workspace, Form(base="embedded"), BASES)
    assert (empty["rank"], empty["max_train_steps"]) == (16, 90)
    whole = preset_of(workspace, Form(draft, "cat", base="embedded", overrides={"rank": 2}), BASES)
    assert (whole["rank"], whole["instance_prompt"]) == (16, "a photo of a <my-cat> cat")
