from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from snell_diffusion.core import apportion

SMALL = settings(derandomize=True, max_examples=60, deadline=None)
LAYERS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.integers(1, 10**9), min_size=1, max_size=12
)


@SMALL
@given(sizes=LAYERS, share=st.floats(0, 1.2), data=st.data())
def test_apportion_adds_up_and_respects_sizes(
    sizes: dict[str, int], share: float, data: st.DataObject
) -> None:
    weight = st.one_of(st.just(0.0), st.floats(0, 1e9), st.floats(1e-300, 1e-200))
    weights = {name: data.draw(weight) for name in sizes}
    total = int(share * sum(sizes.values()))
    keep = apportion(total, sizes, weights)
    assert list(keep) == list(sizes)
    assert sum(keep.values()) == min(total, sum(sizes.values()))
    assert all(0 <= keep[name] <= size for name, size in sizes.items())
    truncated = apportion(total, sizes, weights, exact=False)
    assert all(0 <= keep[name] - truncated[name] <= 1 for name in sizes)
    with_room = [n for n in sizes if truncated[n] < sizes[n]]
    for a in with_room:  # what is not full is in proportion
        for b in with_room:
            if weights[a] > 0 and weights[b] > 0:
                error = truncated[a] * weights[b] - truncated[b] * weights[a]
                assert error <= weights[a] * 1.0001 + 1e-9 * truncated[a] * weights[b]


@SMALL
@given(sizes=LAYERS, data=st.data(), seed=st.randoms())
def test_apportion_does_not_depend_on_the_order_of_layers(
    sizes: dict[str, int], data: st.DataObject, seed: Any
) -> None:
    weights = {name: data.draw(st.sampled_from([0.0, 1.0, 1.0, 2.5])) for name in sizes}
    total = data.draw(st.integers(0, sum(sizes.values())))
    names = list(sizes)
    seed.shuffle(names)
    shuffled = apportion(total, {n: sizes[n] for n in names}, weights)
    assert shuffled == apportion(total, sizes, weights)


def test_small_important_layers_fill_up_first() -> None:
    assert apportion(100, {"a": 30, "b": 100, "c": 100}, {"a": 8, "b": 1, "c": 1}) == {
        "a": 30,
        "b": 35,
        "c": 35,
    }


def test_ties_go_to_the_first_name() -> None:
    assert apportion(4, {"b": 9, "c": 9, "a": 9}, {"a": 1, "b": 1, "c": 1}) == {
        "b": 1,
        "c": 1,
        "a": 2,
    }


def test_layers_without_score_share_evenly_what_full_ones_leave() -> None:
    sizes = {"a": 10, "b": 50, "c": 20}
    assert apportion(50, sizes, {"a": 1.0, "b": 0.0, "c": 0.0}) == {"a": 10, "b": 20, "c": 20}
    assert apportion(55, sizes, {"a": 1.0, "b": 0.0, "c": 0.0}) == {"a": 10, "b": 25, "c": 20}
    assert apportion(9, sizes, {"a": 1.0, "b": 0.0, "c": 0.0}) == {"a": 9, "b": 0, "c": 0}


def test_a_budget_above_the_capacity_fills_every_layer() -> None:
    sizes = {"a": 144, "b": 240}
    assert apportion(10**12, sizes, sizes) == sizes
