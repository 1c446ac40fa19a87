"""Pictures as files and in grids: whole pixels, labels, and no notes that nobody asked for."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from snell_diffusion.app.pictures import SETTINGS_KEY, enlarged, labelled_grid, png_bytes


def picture(width=32, height=32, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def opened(content):
    found = Image.open(io.BytesIO(content))
    found.load()
    return found


def chunks(content):
    """Names of a PNG's chunks."""
    names, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        names.append(content[at + 4 : at + 8].decode())
        at += 12 + length
    return names


def test_small_pictures_are_enlarged_by_whole_pixels():
    small = picture(64, 32)
    large = enlarged(small)
    assert large.size == (384, 192)
    assert np.array_equal(np.asarray(large)[::6, ::6], np.asarray(small))
    assert enlarged(picture(500, 300)).size == (500, 300)


def test_a_png_has_the_pixels_and_nothing_else():
    original = picture()
    notes = PngInfo()
    notes.add_text("camera", "secret")
    file = io.BytesIO()
    original.save(file, "PNG", pnginfo=notes, exif=Image.Exif())
    marked = opened(file.getvalue())
    assert marked.info
    content = png_bytes(marked)
    assert chunks(content) == ["IHDR", "IDAT", "IEND"]
    assert opened(content).info == {}
    assert np.array_equal(np.asarray(opened(content)), np.asarray(original))


def test_settings_are_in_a_png_only_if_given():
    settings = {"prompt": "a café", "seed": 3, "adapters": [{"name": "cat", "strength": 1.0}]}
    content = png_bytes(picture(), settings)
    assert chunks(content) == ["IHDR", "tEXt", "IDAT", "IEND"]
    assert json.loads(opened(content).info[SETTINGS_KEY]) == settings


@pytest.mark.parametrize("size, cell", [((32, 32), 256), ((64, 32), 256), ((1024, 768), 512)])
def test_a_grid_shows_every_picture_whole_and_in_its_place(size, cell):
    colours = [["red", "lime", "blue"], ["white", "black", "gray"]]
    rows = [[Image.new("RGB", size, colour) for colour in row] for row in colours]
    grid = labelled_grid(rows, ["one", "two"], ["a", "b", "c"])
    bare = labelled_grid(rows, ["", ""], ["", "", ""])
    assert grid.size == bare.size
    pitch = cell + 6
    left, top = grid.width - 3 * pitch, grid.height - 2 * pitch
    for r, row in enumerate(colours):
        for c, colour in enumerate(row):
            middle = left + c * pitch + cell // 2, top + r * pitch + cell // 2
            assert grid.getpixel(middle) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert np.any(np.asarray(grid)[:, :left] != np.asarray(bare)[:, :left])  # the row labels
    assert np.any(np.asarray(grid)[:top] != np.asarray(bare)[:top])  # the column labels


def test_a_caption_stands_above_and_long_row_labels_are_cut():
    rows = [[picture()]]
    plain, long = (labelled_grid(rows, [text], ["a"]) for text in ("x" * 40, "x" * 400))
    assert long.width <= plain.width
    captioned = labelled_grid(rows, ["x"], ["a"], "a photo of a sks cat; seed 3 " * 9)
    bare = labelled_grid(rows, ["x"], ["a"])
    assert captioned.width == bare.width
    height = captioned.height - bare.height
    assert height > 40  # several lines
    assert np.array_equal(np.asarray(captioned)[height:], np.asarray(bare))
