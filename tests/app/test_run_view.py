"""The view of a run: what it shows, what it leaves alone, and what its buttons do."""

import json
import time

import gradio as gr
import pytest
from PIL import Image

from snell_diffusion.app.job_record import JobStatus
from snell_diffusion.app.page import build
from snell_diffusion.app.shared import Shared
from snell_diffusion.app.views.run import WAITS, bar_html, run_view
from snell_diffusion.app.workspace import Workspaces
from snell_diffusion.errors import SnellaValueError

LAYERS = [
    {"name": f"unet.{place}.attentions.0.attn{i}.to_{j}", "size": 1000, "budget": 500}
    for place in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    for i in (1, 2)
    for j in "qkvo"
]
PARTS = (
    *("bar", "curves", "samples", "allocation", "pause", "stop", "resume", "draw", "timer"),
    "seen",
)


def write_run(jobs, steps=6, total=12, state="training", asked=None, saved=True):
    """A run's files as the trainer leaves them, of a run that ended without a word."""
    job = jobs.new()
    folder, began = jobs.folder(job), time.time() - 60
    run = folder / "run"
    (run / "samples").mkdir(parents=True)
    if saved:
        (run / "checkpoints" / "step-000005").mkdir(parents=True)
    lines = [{"event": "step", "step": n, "loss": 1 / n} for n in range(1, steps + 1)]
    lines += [{"event": "allocation", "step": n, "layers": LAYERS} for n in (0, 5)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (5, 0):
        Image.new("RGB", (30, 20), (step, 0, 0)).save(run / "samples" / f"step-{step:06d}.png")
    status = {"state": state, "step": steps, "total": total, "pid": 0, "updated": time.time()}
    (run / "status.json").write_text(json.dumps(status))
    (run / "pytorch_snella_weights.safetensors").touch()
    record = {"label": "cat", "started": began, "began": began, "pid": 0, "created": 0.0}
    record |= {"asked": asked, "ended": began + 50, "exit": 1, "spent": 50.0, "facts": {}}
    (folder / "job.json").write_text(json.dumps(record))
    return job


@pytest.fixture
def view(tiny_app, tmp_path):
    """look(run, seen) -> updates by part, on an owner without runs; and the owner's runs."""
    tiny_app = type(tiny_app)(Workspaces(tmp_path / "runs"), tiny_app.studio)
    with gr.Blocks() as page, gr.Tabs() as tabs, gr.Tab():
        made = run_view(Shared(tiny_app, page, tabs, gr.State()), gr.State())

    class Visitor:
        username = None

    def look(run, seen=None):
        return dict(zip(PARTS, made.look(run, seen, Visitor()), strict=True))

    return look, tiny_app.workspaces.of(None).jobs


def unchanged(update):
    return isinstance(update, dict) and update == gr.skip()


def test_without_a_run_it_says_so_and_stops_asking_after_a_while(view):
    look, _ = view
    seen, active = None, []
    for _ in range(WAITS + 1):
        shown = look(None, seen)
        seen = shown["seen"]
        active.append(shown["timer"])
    assert "No run yet." in look(None)["bar"]
    assert active[0]["active"] is True
    assert active[WAITS - 1]["active"] is False
    assert unchanged(active[WAITS])


def test_a_run_is_shown_whole_and_then_only_what_changed(view):
    look, jobs = view
    job = write_run(jobs)
    first = look(job)
    assert [caption for _, caption in first["samples"]] == ["step 0", "step 5"]
    assert list(first["curves"]["value"]["step"]) == [1, 2, 3, 4, 5, 6]
    assert first["curves"]["visible"] is True  # empty ones are not drawn: they would stay empty
    assert look(None)["curves"]["visible"] is False
    assert first["allocation"].width > 300
    again = look(job, first["seen"])
    assert all(unchanged(again[name]) for name in PARTS[:-1])
    with (jobs.folder(job) / "run" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "step", "step": 7, "loss": 0.1}) + "\n")
    grown = look(job, again["seen"])
    assert [name for name in PARTS[:-1] if not unchanged(grown[name])] == ["curves"]


@pytest.mark.parametrize(
    "state, asked, saved, enabled, resume",
    [
        ("finished", None, True, {"draw"}, "Resume"),
        ("stopped", "stop", True, {"resume", "draw"}, "Resume"),
        ("stopped", "pause", True, {"stop", "resume"}, "Resume"),
        ("failed", None, True, {"resume"}, "Resume"),
        ("failed", None, False, {"resume"}, "Start again"),
    ],
)
def test_buttons_are_enabled_while_they_do_something(view, state, asked, saved, enabled, resume):
    look, jobs = view
    job = write_run(jobs, state=state, asked=asked, saved=saved)
    shown = look(job)
    buttons = ("pause", "stop", "resume", "draw")
    assert {name for name in buttons if shown[name]["interactive"]} == enabled
    assert shown["resume"]["value"] == resume
    assert shown["timer"]["active"] is False


def test_a_run_that_was_deleted_meanwhile_is_said_once(view):
    look, jobs = view
    job = write_run(jobs)
    seen = look(job)["seen"]
    jobs.delete(job)
    gone = look(job, seen)
    assert "this run is no longer there" in gone["bar"]
    assert gone["samples"] == []
    assert unchanged(look(job, gone["seen"])["bar"])


def test_a_forged_id_shows_nothing(view):
    look, _ = view
    assert "not the id of one" in look("../../etc")["bar"]


def test_what_a_log_says_cannot_become_part_of_the_page():
    status = JobStatus("failed", 1, 2, message='<img src=x onerror="alert(1)">')
    assert "<img" not in bar_html(status)
    assert "&lt;img" in bar_html(status)


def test_the_bar_is_named_and_quiet_while_steps_are_counted():
    going = bar_html(JobStatus("training", 3, 12, 5.0))
    assert 'aria-label="Progress of the run"' in going
    assert 'value="0.2500"' in going
    assert 'aria-live="off"' in going
    assert 'aria-live="polite"' in bar_html(JobStatus("finished", 12, 12))
    assert "value=" not in bar_html(JobStatus("starting"))  # moves without saying how far


def test_a_look_at_a_long_run_takes_less_than_50_ms(view):
    look, jobs = view
    job = write_run(jobs, steps=2000, total=4000)
    seen = look(job)["seen"]
    start = time.process_time()
    for step in range(2001, 2011):
        with (jobs.folder(job) / "run" / "log.jsonl").open("a") as log:
            log.write(json.dumps({"event": "step", "step": step, "loss": 0.1}) + "\n")
        seen = look(job, seen)["seen"]
    assert (time.process_time() - start) / 10 < 0.05


def test_two_views_of_a_page_have_ids_of_their_own(tiny_app):
    ids = [part.elem_id for part in build(tiny_app).blocks.values() if part.elem_id]
    for name in ("bar", "curves", "samples", "allocation", "pause", "stop", "resume", "draw"):
        assert ids.count(f"runs-run-{name}") == ids.count(f"personalize-run-{name}") == 1


def test_drawing_with_a_run_without_an_adapter_is_refused(view):
    _, jobs = view
    with pytest.raises(SnellaValueError, match="no adapter yet"):
        jobs.adapter(write_run(jobs, state="failed"))
