"""The Runs tab: rows, files and the model card of a run, as values and over HTTP."""

import time

import pytest
import yaml

from snell_diffusion.app.run_files import (
    NO_CARD,
    file_name,
    log_text,
    model_card,
    settings_text,
)
from snell_diffusion.app.tabs import runs
from snell_diffusion.app.workspace import Workspaces
from tests.app.test_run_view import write_run

CARD = """---
license: unknown
widget:
- text: x
---
# a photo of a sks cat

![Samples](samples.png)

[a](javascript:alert(1)) <script>alert(2)</script> ![x](https://example.org/pixel.png)

output_dir: /srv/app/runs/ab/run
"""


@pytest.fixture
def jobs(tmp_path):
    return Workspaces(tmp_path / "runs").of(None).jobs


@pytest.fixture
def job(jobs):
    job = write_run(jobs, state="finished")
    folder = jobs.folder(job)
    settings = {
        "instance_data_dir": str(folder / "photos"),
        "output_dir": str(folder / "run"),
        "pretrained_model_name_or_path": "/opt/models/tiny",
        "concepts": [{"instance_data_dir": str(folder / "photos")}],
        "seed": 3,
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    (folder / "run" / "README.md").write_text(CARD)
    (folder / "train.log").write_text(
        f"train: 1%\rtrain: 100%\nadapter: {folder}/run/x.safetensors\n"
    )
    return job


def test_the_table_has_a_row_per_run_newest_first(jobs, job):
    other = write_run(jobs, state="failed")
    hint, rows, choice = runs._rows(jobs, job)
    assert hint == runs.CHOOSE
    by_id = {row[-1]: row for row in rows}
    assert by_id[job[:8]][:6] == ["cat", "-", "-", "finished", "50 s", "6 of 12"]
    assert by_id[other[:8]][3] == "failed"
    assert [value for _, value in choice["choices"]] == jobs.all()
    assert choice["value"] == job


def test_an_empty_table_says_what_to_do(jobs):
    hint, rows, choice = runs._rows(jobs, None)
    assert (hint, rows, choice["choices"], choice["value"]) == (runs.NONE, [], [], None)


def test_a_run_that_is_gone_is_no_longer_chosen(jobs, job):
    jobs.delete(job)
    assert runs._rows(jobs, job)[2]["value"] is None


def test_what_the_tab_shows_besides_the_view(jobs, job):
    parts = runs._parts(jobs, job, jobs.status(job))
    made = {name: make() for name, (_, make) in parts.items()}
    assert made["details"]["visible"] is True
    assert made["saved"][0][:2] == ["5", "0.0 MB"]
    assert made["delete"]["interactive"] is True
    names = [path.rpartition("/")[2] for path in made["files"]]
    assert names == ["cat-adapter.safetensors", "cat-settings.yaml", "cat-log.txt"]


def test_the_card_is_shown_without_its_head_its_pictures_and_places(jobs, job):
    card = model_card(jobs, job)
    assert card.startswith("# a photo of a sks cat")
    assert "![" not in card
    assert "/srv" not in card
    assert "output_dir: run" in card


def test_a_run_without_a_card_says_when_it_comes(jobs, job):
    (jobs.folder(job) / "run" / "README.md").unlink()
    assert model_card(jobs, job) == NO_CARD


def test_settings_and_log_name_no_folder_of_the_server(jobs, job):
    settings = yaml.safe_load(settings_text(jobs, job))
    assert settings["instance_data_dir"] == settings["concepts"][0]["instance_data_dir"] == "photos"
    assert settings["pretrained_model_name_or_path"] == "tiny"
    assert settings["seed"] == 3
    assert log_text(jobs, job) == "train: 100%\nadapter: x.safetensors\n"


@pytest.mark.parametrize(
    "label, name",
    [
        ("My Cat, 5 photos", "my-cat-5-photos-log.txt"),
        ("../../etc/passwd", "etc-passwd-log.txt"),
        ("\u732b", "run-log.txt"),
        ("x" * 200, "x" * 40 + "-log.txt"),
    ],
)
def test_files_have_names_that_any_system_takes(label, name):
    assert file_name(label, "log.txt") == name


def test_a_table_of_many_runs_is_filled_quickly(jobs):
    for _ in range(100):
        write_run(jobs, state="finished")
    runs._rows(jobs, None)
    start = time.process_time()
    assert len(runs._rows(jobs, None)[1]) == 100
    assert time.process_time() - start < 1.0
