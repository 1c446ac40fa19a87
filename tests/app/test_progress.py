"""How far a run is, from the values that it wrote: sentence, curves, row, allocation picture."""

import time

import numpy as np
import pytest

from snell_diffusion.app.allocation import (
    AllocationPictures,
    allocation,
    block,
    by_block,
    colours,
    draw,
)
from snell_diffusion.app.event_log import EventLogs
from snell_diffusion.app.job_record import JobStatus
from snell_diffusion.app.progress import (
    BASE,
    HELD_OUT,
    POINTS,
    TRAINING,
    curves,
    duration,
    sentence,
    share,
    smooth,
    summary,
)


def step(number, loss):
    return {"event": "step", "step": number, "loss": loss}


def held_out(number, loss, base=0.9):
    return {
        "event": "validation",
        "step": number,
        "validation_loss": loss,
        "validation_loss_base": base,
    }


def record(number, shares, size=100):
    rows = [{"name": n, "size": size, "budget": round(s * size)} for n, s in shares.items()]
    return {"event": "allocation", "step": number, "layers": rows}


LAYERS = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 0.5,
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 0.25,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 1.0,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": 0.0,
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": 0.75,
}


def test_the_curve_is_a_trailing_mean():
    assert smooth([1.0, 3.0, 5.0, 1.0, 0.0, 6.0]) == pytest.approx([1, 2, 3, 2.5, 2, 3])
    assert smooth([]) == []


def test_curves_hold_every_kind_and_few_points():
    events = [step(n, 1.0) for n in range(1, 2001)] + [held_out(0, 0.9), held_out(50, 0.4)]
    points = curves(events)
    training = [point for point in points if point[2] == TRAINING]
    assert len(training) == POINTS
    assert [training[0][0], training[-1][0]] == [1, 2000]
    assert [p for p in points if p[2] == HELD_OUT] == [(0, 0.9, HELD_OUT), (50, 0.4, HELD_OUT)]
    assert [p for p in points if p[2] == BASE] == [(0, 0.9, BASE), (50, 0.9, BASE)]


def test_what_was_not_measured_is_not_plotted():
    drift = {"event": "validation", "step": 5, "drift": 0.1}
    assert curves([drift, step(1, float("nan")), {"event": "note", "message": "x"}]) == []


@pytest.mark.parametrize(
    "status, words",
    [
        (JobStatus("training", 3, 10, 95.0), "Training: step 3 of 10, about 1 min 35 s left."),
        (JobStatus("training", 3, 10), "Training: step 3 of 10."),
        (JobStatus("starting"), "Starting: the model is being loaded (the first step)."),
        (JobStatus("sampling", 5, 10), "Drawing sample pictures (step 5 of 10)."),
        (JobStatus("stopping", 5, 10), "Stopping at step 5 of 10: the state is being saved."),
        (JobStatus("finished", 10, 10), "Finished: step 10 of 10."),
        (
            JobStatus("paused", 4, 10, resumable=True),
            "Paused at step 4 of 10. It can be resumed from its last saved step.",
        ),
        (
            JobStatus("failed", 4, 10, message="The disk is full."),
            "Failed at step 4 of 10. The disk is full. Nothing was saved yet: it can be started "
            "again.",
        ),
    ],
)
def test_a_status_is_a_sentence(status, words):
    assert sentence(status) == words


@pytest.mark.parametrize(
    "seconds, words", [(0.4, "0 s"), (61, "1 min 1 s"), (7500, "2 h 5 min"), (-3, "0 s")]
)
def test_durations_are_read_at_a_glance(seconds, words):
    assert duration(seconds) == words


def test_the_share_done_is_at_most_one():
    assert [share(JobStatus("training", *at)) for at in ((0, 0), (3, 4), (5, 4))] == [0, 0.75, 1]


def test_a_row_of_the_table():
    info = {"label": "a cat", "started": 0.0, "facts": {"base": "embedded", "method": "snella"}}
    events = [held_out(0, 0.9), held_out(5, 0.4), held_out(10, 0.6)]
    row = summary("0" * 32, info, JobStatus("stopped", 10, 20), 61.0, events)
    assert (row.subject, row.base, row.method, row.best_loss) == (
        "a cat",
        "embedded",
        "snella",
        0.4,
    )
    assert (row.steps, row.status) == ("10 of 20", "stopped")
    assert summary("0" * 32, info, JobStatus("training", 3, 20), 1.0, []).steps == "of 20"


def test_layers_stand_in_the_order_of_the_network():
    found = allocation([record(0, LAYERS), record(5, {**LAYERS, next(iter(LAYERS)): 0.1})])
    assert found.blocks == ["text 3", "down 0", "down 0", "mid", "up 1"]
    assert found.steps == [0, 5]
    assert found.share_TL.tolist() == [[0.75, 1.0, 0.0, 0.5, 0.25], [0.75, 1.0, 0.0, 0.1, 0.25]]
    assert by_block(found) == (["text 3", "down 0", "mid", "up 1"], [0.75, 0.5, 0.1, 0.25])


@pytest.mark.parametrize(
    "name, label",
    [
        ("transformer.transformer_blocks.7.attn.to_q", "block 7"),
        ("unet.mid_block.attentions.0.to_q", "mid"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text 0"),
        ("transformer.proj_out", "block"),
    ],
)
def test_blocks_of_other_families_have_labels(name, label):
    assert block(name) == label


def test_a_run_without_levels_has_no_picture():
    assert allocation([step(1, 0.5)]) is None
    assert AllocationPictures().get("0" * 32, [step(1, 0.5)]) is None


def test_the_picture_shows_the_shares_in_their_colours():
    found = allocation([record(0, LAYERS)])
    pixels = np.asarray(draw(found)).astype(int)
    shown = {tuple(pixel) for row in pixels for pixel in row}
    for level in (0.75, 1.0, 0.0, 0.5, 0.25):
        assert tuple(colours(np.array([[level]]))[0, 0].astype(int)) in shown


def test_colours_grow_lighter_with_the_share():
    light = colours(np.linspace(0, 1, 64)[None])[0] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light) > 0).all()


def test_a_large_picture_takes_less_than_a_tenth_of_a_second_and_is_drawn_once():
    names = {
        f"transformer.transformer_blocks.{i}.attn.to_{j}": 0.5 for i in range(60) for j in "qkvo"
    }
    events = [record(number, names) for number in range(21)]
    pictures = AllocationPictures()
    pictures.get("warm", events)
    start = time.process_time()
    first = pictures.get("0" * 32, events)
    assert time.process_time() - start < 0.1
    assert pictures.get("0" * 32, events) is first
    assert pictures.get("0" * 32, [*events, record(21, names)]) is not first


# -- the log, read while it grows -----------------------------------------------------------------


def test_only_whole_lines_are_read_and_each_once(tmp_path):
    log, logs = tmp_path / "log.jsonl", EventLogs()
    assert logs.events(log) == []
    log.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    assert logs.events(log) == [{"event": "step", "step": 1}]
    with log.open("a") as file:
        file.write('ep": 2}\nnot json\n[1]\n{"event": "note"}\n')
    assert [event["event"] for event in logs.events(log)] == ["step", "step", "note"]


def test_a_log_that_a_resumed_run_cut_is_read_anew(tmp_path):
    log, logs = tmp_path / "log.jsonl", EventLogs()
    log.write_text("".join(f'{{"event": "step", "step": {n}}}\n' for n in range(9)))
    assert len(logs.events(log)) == 9
    shorter = tmp_path / "new"
    shorter.write_text('{"event": "step", "step": 0}\n')
    shorter.rename(log)
    assert [event["step"] for event in logs.events(log)] == [0]


def test_a_second_look_at_a_long_log_costs_next_to_nothing(tmp_path):
    log, logs = tmp_path / "log.jsonl", EventLogs()
    log.write_text("".join(f'{{"event": "step", "step": {n}, "loss": 0.5}}\n' for n in range(2000)))
    logs.events(log)
    start = time.process_time()
    for _ in range(20):
        assert len(logs.events(log)) == 2000
    assert (time.process_time() - start) / 20 < 0.005
