"""The demo's parts that need no training: photos, picture, numbers from the log."""

import json

import numpy as np
import pytest
from PIL import Image

from scripts.demo import PROMPTS, measured
from scripts.demo_photos import (
    CAPTIONS,
    HELD_OUT_CROP,
    SIDE,
    TRAIN_CROPS,
    crop,
    photograph,
    write_photos,
)
from scripts.demo_picture import CELL, GAP, HEAD, LABEL, Row, comparison


def test_the_photos_are_distinct_crops_inside_the_photograph(tmp_path):
    width, height = photograph().size
    boxes = [*TRAIN_CROPS, HELD_OUT_CROP]
    assert len(set(boxes)) == len(boxes) >= 6
    for left, top, side in boxes:
        assert 0 <= left <= width - side
        assert 0 <= top <= height - side
    photos, holdout = write_photos(tmp_path)
    assert len(list(photos.glob("*.png"))) == len(TRAIN_CROPS)
    captions = [file.read_text("utf-8").strip() for file in sorted(photos.glob("*.txt"))]
    assert captions == [CAPTIONS[i % len(CAPTIONS)] for i in range(len(TRAIN_CROPS))]
    (held_out,) = holdout.glob("*.png")
    with Image.open(held_out) as picture:
        assert picture.size == (SIDE, SIDE)
        assert np.array_equal(picture, crop(photograph(), HELD_OUT_CROP))


def test_the_demo_asks_for_new_scenes():
    assert len(PROMPTS) >= 4
    trained = CAPTIONS[0].removeprefix("a photo of a sks bowl ")
    assert trained == "on a wooden floor"
    assert len([prompt for prompt in PROMPTS if trained not in prompt]) >= 2


def test_every_picture_lands_in_its_cell_with_its_own_pixels():
    colours = [["red", "lime"], ["blue", "black"]]
    rows = [
        Row(name, [Image.new("RGB", (64, 64), c) for c in line])
        for name, line in zip(("one", "two"), colours, strict=True)
    ]
    sheet = comparison(("left", "right"), rows)
    for y, line in enumerate(colours):
        for x, colour in enumerate(line):
            centre = (LABEL + x * (CELL + GAP) + CELL // 2, HEAD + y * (CELL + GAP) + CELL // 2)
            assert sheet.getpixel(centre) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert np.asarray(sheet)[:HEAD, LABEL:].min() < 100  # the titles are written


def test_a_row_that_lacks_a_picture_is_refused():
    with pytest.raises(ValueError, match=r"row 'one' needs 2 pictures \(left, right\), got 1"):
        comparison(("left", "right"), [Row("one", [Image.new("RGB", (8, 8))])])


def test_losses_come_from_the_last_validation(tmp_path):
    events = [
        {"event": "validation", "step": 0, "validation_loss_base": 0.5, "validation_loss": 0.5},
        {"event": "step", "step": 1, "loss": 9.0},
        {"event": "validation", "step": 1, "validation_loss_base": 0.5, "validation_loss": 0.4},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert measured(tmp_path) == (0.5, 0.4)
    (tmp_path / "log.jsonl").write_text(json.dumps(events[1]) + "\n")
    with pytest.raises(ValueError, match="must name a holdout"):
        measured(tmp_path)
