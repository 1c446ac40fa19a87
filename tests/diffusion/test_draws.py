"""Which photo, shape and prompt a sample gets: each photo its share, whoever asks, in any order."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.views import Draws

SHAPES = [(16, 16), (16, 24), (24, 16)]


def photo(number: int, size: tuple[int, int] = (16, 16), **more: Any) -> Photo:
    return Photo(Path(f"{number}.png"), f"prompt {number}", str(number), size, b"", **more)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(instance_data_dir="x", instance_prompt="x", resolution=16, **changes)


def seen(draws: Draws, micro_batches: int) -> list[list[int]]:
    return [
        [draws.index(step, 0, place) for place in range(draws.batch * draws.world)]
        for step in range(1, micro_batches + 1)
    ]


STREAMS = st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(1, 3)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(STREAMS, st.integers(1, 3), st.integers(1, 2), st.integers(0, 5))
def test_every_photo_gets_its_share_in_batches_of_one_shape(
    stream: list[tuple[tuple[int, int], int]], batch: int, world: int, seed: int
) -> None:
    """Two epochs of micro-batches: each photo as often as it repeats, times the batch, twice."""
    photos = [photo(i, size, repeats=repeats) for i, (size, repeats) in enumerate(stream)]
    draws = Draws(config(seed=seed), "instance", photos, batch, 0, world, SHAPES)
    epoch = sum(p.repeats for p in photos)
    batches = seen(draws, 2 * epoch)
    for step, indices in enumerate(batches, start=1):
        assert {draws.shape_of(photos[i]) for i in indices} == {draws.shape(step, 0)}
    counts = Counter(i for indices in batches for i in indices)
    size = batch * world
    assert counts == {i: 2 * size * p.repeats for i, p in enumerate(photos)}


@settings(max_examples=30, deadline=None)
@given(STREAMS, st.integers(1, 3), st.integers(0, 5))
def test_two_processes_share_what_one_draws(
    stream: list[tuple[tuple[int, int], int]], batch: int, seed: int
) -> None:
    photos = [photo(i, size, repeats=repeats) for i, (size, repeats) in enumerate(stream)]
    plan = config(seed=seed, gradient_accumulation_steps=2, caption_dropout=0.3, random_flip=True)
    one = Draws(plan, "instance", photos, 2 * batch, 0, 1, SHAPES, 0.3)
    two = [Draws(plan, "instance", photos, batch, rank, 2, SHAPES, 0.3) for rank in (0, 1)]
    for step, micro in ((1, 0), (9, 1), (2, 1)):
        assert {part.shape(step, micro) for part in two} == {one.shape(step, micro)}
        halves = [
            (part.index(step, micro, p), part.view(step, micro, p), part.prompt(step, micro, p))
            for part in two
            for p in part.places()
        ]
        whole = [
            (one.index(step, micro, p), one.view(step, micro, p), one.prompt(step, micro, p))
            for p in one.places()
        ]
        assert halves == whole


def test_photos_of_one_shape_come_as_without_buckets() -> None:
    photos = [photo(i) for i in range(5)]
    plain = Draws(config(), "instance", photos, 3, 0, 1)
    assert seen(Draws(config(), "instance", photos, 3, 0, 1, SHAPES), 12) == seen(plain, 12)
    assert plain.shape(1, 0) == (16, 16)


def test_shapes_take_turns_at_random() -> None:
    photos = [photo(i, SHAPES[i % 2]) for i in range(8)]
    draws = Draws(config(), "instance", photos, 2, 0, 1, SHAPES)
    turns = [draws.shape(step, 0) for step in range(1, 81)]
    epochs = {tuple(turns[start : start + 8]) for start in range(0, 80, 8)}
    assert len(epochs) > 5


def prompts(draws: Draws, count: int = 300) -> Counter[str]:
    return Counter(draws.prompt(step, 0, 0) for step in range(1, count + 1))


def test_templates_take_turns_and_captions_stay() -> None:
    told = photo(0, templates=("a photo of x", "x outside", "a drawing of x"))
    found = prompts(Draws(config(), "instance", [told], 1, 0, 1))
    assert found.keys() == set(told.templates)
    assert min(found.values()) > 70
    captioned = Draws(config(), "instance", [photo(1, captioned=True)], 1, 0, 1)
    assert prompts(captioned, 20).keys() == {"prompt 1"}


@pytest.mark.parametrize("share, least, most", [(0.0, 0, 0), (0.2, 35, 85), (1.0, 300, 300)])
def test_captions_are_dropped_as_often_as_asked(share: float, least: int, most: int) -> None:
    draws = Draws(config(), "instance", [photo(0)], 1, 0, 1, (), share)
    assert least <= prompts(draws)[""] <= most


def test_all_prompts_are_known_before_the_first_step() -> None:
    photos = [photo(0, templates=("a", "b")), photo(1, prior_prompt="class")]
    plain = Draws(config(), "instance", photos, 1, 0, 1)
    assert set(plain.prompts()) == {"a", "b", "prompt 0", "prompt 1"}
    held = config(with_prior_preservation=True, prior_loss="prediction")
    draws = Draws(held, "instance", photos, 1, 0, 1, (), 0.1)
    assert set(draws.prompts()) == {"a", "b", "prompt 0", "prompt 1", "class", ""}
