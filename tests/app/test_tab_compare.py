"""The Compare tab over HTTP: a labelled grid, its download, and sentences for what cannot be."""

import numpy as np
import pytest
from gradio_client.exceptions import AppError
from PIL import Image

from tests.app.adapters import adapter_file
from tests.app.visitor import Visitor

CELL = 256 + 6  # pixels from one picture of a grid to the next


@pytest.fixture(scope="module")
def adapters(page_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    library = page_server.app.workspaces.of(None).library
    files = [adapter_file(folder / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    return [library.add(path) for path in files]


@pytest.fixture
def visitor(page_server, adapters):
    visitor = Visitor(page_server.address)
    visitor.show("compare")
    visitor.set(compare_steps=2, compare_prompt="a cat")
    yield visitor
    visitor.close()


def cells(path, rows, columns):
    """The pictures of a grid, row by row."""
    with Image.open(path) as grid:
        found = np.asarray(grid.convert("RGB"))
    left, top = found.shape[1] - columns * CELL, found.shape[0] - rows * CELL
    return [
        found[top + r * CELL : top + r * CELL + 256, left + c * CELL : left + c * CELL + 256]
        for r in range(rows)
        for c in range(columns)
    ]


def test_strength_by_sparsity_is_one_grid_with_equal_ends(visitor, adapters):
    visitor.set(compare_adapter_1=adapters[0].id)
    visitor.set(compare_rows_values="0, 1", compare_columns_values="as trained, 0.9, 1")
    updates = visitor.press("compare-draw")
    found = cells(updates["compare-grid"], 2, 3)
    base = found[0]
    assert [np.array_equal(base, cell) for cell in found] == [True, True, True, False, False, True]
    assert not np.array_equal(found[3], found[4])


def test_the_download_is_the_grid_without_notes(visitor, adapters):
    visitor.set(compare_rows="seed", compare_rows_values="1 2", compare_columns="prompt")
    updates = visitor.press("compare-draw", compare_columns_values="a cat\na dog")
    with Image.open(updates["compare-download"]["value"]) as file:
        assert (file.format, file.info) == ("PNG", {})
        assert np.array_equal(np.asarray(file), np.asarray(Image.open(updates["compare-grid"])))
    assert len({cell.tobytes() for cell in cells(updates["compare-grid"], 2, 2)}) == 4


def test_adapters_are_compared_with_the_base(visitor, adapters):
    visitor.set(compare_rows="adapter", compare_columns="seed", compare_columns_values="4")
    updates = visitor.press("compare-draw", compare_adapters=["", *(a.id for a in adapters)])
    assert len({cell.tobytes() for cell in cells(updates["compare-grid"], 3, 1)}) == 3


def test_choosing_what_changes_shows_usual_values(visitor):
    updates = visitor.press("compare-rows", "input", compare_rows="seed")
    assert updates["compare-rows-values"]["value"] == "0, 1, 2"
    updates = visitor.press("compare-rows", "change", compare_rows="adapter")
    assert updates["compare-adapters"]["visible"] is True


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"compare_rows_values": "x"}, "the strength 'x' is not a number: write numbers"),
        ({"compare_rows_values": ""}, "the strength has no values"),
        (
            {"compare_rows": "sparsity", "compare_rows_values": "0"},
            "rows and columns are both the sparsity",
        ),
        ({}, "choose an adapter first"),
        ({"compare_rows": "seed", "compare_rows_values": "-1"}, "choose an adapter|the seed must"),
        ({"compare_rows": "adapter"}, "the adapter has no values: choose at least one"),
        ({"compare_rows": "adapter", "compare_adapters": ["../x"]}, "choices|choose"),
        ({"compare_rows": "colour"}, "choices|compare one of"),
    ],
)
def test_a_wrong_comparison_is_answered_with_a_sentence(visitor, changes, message):
    visitor.set(compare_rows_values="0")
    with pytest.raises(AppError, match=message):
        visitor.press("compare-draw", **changes)
