"""Comparisons: what is typed becomes a bounded grid of requests, or a sentence."""

import pytest

from snell_diffusion.app.compare import KINDS, Axis, caption, plan, read_axis
from snell_diffusion.errors import SnellaValueError

A, B = "a" * 32, "b" * 32
NAMES = {A: "cat", B: "dog"}
COMMON = {
    "base": "tiny",
    "prompt": "a sks cat",
    "negative_prompt": "",
    "seed": 3,
    "steps": 2,
    "guidance": 3.0,
    "width": 32,
    "height": 32,
    "adapters": [(A, 0.7)],
}


def axis(kind, text="", adapters=()):
    return read_axis(kind, text, adapters, NAMES)


@pytest.mark.parametrize(
    "kind, text, values, labels",
    [
        ("strength", "0, 0.5;1", (0.0, 0.5, 1.0), ("strength 0", "strength 0.5", "strength 1")),
        ("seed", " 1\n2 3,", (1, 2, 3), ("seed 1", "seed 2", "seed 3")),
        ("sparsity", "As  trained, .9", (None, 0.9), ("sparsity as trained", "sparsity 0.9")),
        ("prompt", "a, b\n\n  c  d ", ("a, b", "c d"), ("a, b", "c d")),
    ],
)
def test_typed_values_are_read(kind, text, values, labels):
    assert axis(kind, text) == Axis(kind, values, labels)


def test_adapters_are_chosen_and_called_by_their_labels():
    assert axis("adapter", "", ["", B]).labels == ("base model alone", "dog")


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("colour", "1", "compare one of strength, sparsity, seed, prompt, adapter, not 'colour'"),
        (None, "1", "compare one of"),
        ("seed", "1, x", "the seed 'x' is not a number: write whole numbers"),
        ("seed", "1.5", "the seed '1.5' is not a number"),
        ("seed", "9" * 5000, "is not a number"),
        ("strength", "", "the strength has no values: write numbers"),
        ("strength", None, "the strength must be given as text"),
        ("prompt", "\n \n", "the prompt has no values: write one prompt on each line"),
        ("adapter", "x", "the adapter has no values: choose at least one"),
        ("seed", "1 1", "the seed 1 is given twice"),
        ("seed", " ".join(map(str, range(37))), "the seed has 37 values; .* up to 36"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(kind, text, message):
    with pytest.raises(SnellaValueError, match=message):
        axis(kind, text)


def test_every_combination_is_a_request_row_by_row():
    grid = plan(COMMON, axis("strength", "0 1"), axis("sparsity", "as trained, 0.5, 0.9"))
    found = [(request.adapters, request.sparsity) for request in grid.requests]
    levels = (None, 0.5, 0.9)
    assert found == [(((A, strength),), level) for strength in (0.0, 1.0) for level in levels]
    assert grid.in_rows("uvwxyz") == [["u", "v", "w"], ["x", "y", "z"]]
    assert {request.prompt for request in grid.requests} == {"a sks cat"}


def test_adapters_take_the_common_strength_and_the_base_has_none():
    grid = plan(COMMON, axis("adapter", "", [A, B, ""]), axis("sparsity", "0.5"))
    assert [(r.adapters, r.sparsity) for r in grid.requests] == [
        (((A, 0.7),), 0.5),
        (((B, 0.7),), 0.5),
        ((), None),
    ]


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_any_two_different_kinds_make_a_grid(first, second):
    usual = {"strength": "0 1", "sparsity": "0 1", "seed": "0 1", "prompt": "a\nb", "adapter": ""}
    axes = [axis(kind, usual[kind], [A, B]) for kind in (first, second)]
    if first == second:
        with pytest.raises(SnellaValueError, match=f"rows and columns are both the {first}"):
            plan(COMMON, *axes)
    else:
        assert len(set(plan(COMMON, *axes).requests)) == 4


@pytest.mark.parametrize(
    "common, rows, columns, message",
    [
        ({"adapters": []}, ("strength", "0 1"), ("seed", "1"), "choose an adapter first"),
        ({}, ("strength", "0 3"), ("seed", "1"), "the strength of an adapter must be 0 to 2"),
        ({}, ("sparsity", "nan"), ("seed", "1"), "the sparsity must be a number from 0 to 1"),
        ({}, ("seed", "-1"), ("sparsity", "0"), "the seed must be a whole number"),
        ({}, ("prompt", "x" * 301), ("seed", "1"), "the prompt has 301 characters"),
        ({}, ("seed", "1 2 3 4 5 6 7"), ("strength", "0 .1 .2 .3 .4 .5"), "7 x 6 are 42 pictures"),
        ({"steps": 0}, ("seed", "1"), ("sparsity", "0"), "the number of steps must be"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused(common, rows, columns, message):
    with pytest.raises(SnellaValueError, match=message):
        plan({**COMMON, **common}, axis(*rows), axis(*columns))


def test_the_caption_says_what_all_pictures_share():
    assert caption(COMMON, {"strength", "seed"}, NAMES) == (
        "a sks cat; cat; base tiny; 2 steps, guidance 3"
    )
    assert caption(COMMON, {"prompt", "sparsity"}, NAMES) == (
        "cat at 0.7; seed 3; base tiny; 2 steps, guidance 3"
    )
