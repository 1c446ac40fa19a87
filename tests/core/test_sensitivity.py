"""Marks, budgets and memory of the sensitivity choice, beside the recorded cases."""

import tracemalloc

import pytest
import torch

from snell_diffusion.core.sensitivity import (
    accumulate,
    adapter_size,
    choose,
    lora_size,
    ranked,
    scatter,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "a.weight": draw(8, 6, seed=seed) ** 4,
        "a.bias": draw(8, seed=seed + 1) ** 4,
        "norm.weight": draw(10, seed=seed + 2) ** 4,
        "b.weight": draw(5, 8, seed=seed + 3) ** 8,
    }


STRUCTURED = {"a.weight": lora_size(1, 8, 6), "b.weight": lora_size(1, 5, 8)}


def test_sizes():
    assert lora_size(8, 768, 768) * 48 + lora_size(8, 3072, 768) * 24 == 1_327_104
    ends = [768] * 5 + [3072]
    assert 12 * sum(adapter_size(8, width, width) for width in ends) == 1_410_624


def test_batches_are_squared_before_they_are_summed():
    g = torch.tensor([1.0, -2.0])
    assert accumulate([{"w": g}, {"w": -g}])["w"].tolist() == [2.0, 8.0]
    later = accumulate([{"w": g}, {"v": g.bfloat16()}])
    assert list(later) == ["w", "v"]
    assert later["v"].dtype == torch.float32


def test_gradients_that_are_none_or_not_finite():
    with pytest.raises(ValueError, match="of at least one batch, got none"):
        accumulate([])
    with pytest.raises(ValueError, match=r"gradient of w is not finite.* loss in float32"):
        accumulate([{"w": torch.tensor([torch.inf])}])
    with pytest.raises(ValueError, match="or its square is not"):
        accumulate([{"w": torch.tensor([1e30])}])


@pytest.mark.parametrize("most", [1, 7, 50, 10_000])
def test_ranked_is_one_sort_of_all_entries(most):
    tensors = [draw(7, 9, seed=n).mul(8).floor() for n in range(5)]  # with many ties
    flat = torch.cat([t.flatten() for t in tensors])
    order = flat.argsort(descending=True, stable=True)[:most]
    which, where = ranked(tensors, most)
    assert torch.equal(which * 63 + where, order)


@pytest.mark.parametrize("structured_only", [False, True])
@pytest.mark.parametrize("structured_vectors", [False, True])
def test_totals_are_what_is_chosen(structured_only, structured_vectors):
    given = scores()
    found = choose(
        given,
        STRUCTURED,
        [1.0, 0.5, 0.3],
        unit=40,
        extra=3,
        structured_only=structured_only,
        structured_vectors=structured_vectors,
    )
    for choice in found.values():
        sizes = {**{n: s.numel() for n, s in given.items()}, **STRUCTURED}
        whole = (*choice.matrices, *choice.vectors)
        assert choice.structured == sum(sizes[name] for name in whole)
        assert choice.single == sum(map(len, choice.entries.values()))
        assert choice.total == choice.structured + choice.single + 3
        assert {*whole} | {*choice.entries} == {*given}
        if structured_only:
            assert choice.single == 0
        if not structured_vectors:
            assert choice.vectors == ()
        which, where = ranked(list(given.values()), choice.marks)
        for number, name in enumerate(given):
            if name in choice.entries and not structured_only:
                assert set(choice.entries[name].tolist()) == set(where[which == number].tolist())


def test_the_closest_total_wins_and_of_equal_ones_the_later():
    one = {"w": torch.arange(10.0)}
    found = choose(one, {}, [4.0], unit=1, structured_vectors=False, taus=[1, 3, 5, 6])
    assert found[4.0].marks == 5  # 3 and 5 are as close
    assert found[4.0].entries["w"].tolist() == [5, 6, 7, 8, 9]


def test_budgets_that_nothing_comes_close_to_are_left_out():
    one = {"w": torch.ones(100, 100)}
    sizes = {"w": 50}
    assert choose(one, sizes, [10.0], unit=1, taus=[5, 20]) == {}
    assert choose(one, sizes, [25.0], unit=1, taus=[5, 20])[25.0].structured == 50


def test_more_marks_than_entries():
    found = choose({"w": torch.ones(3)}, {}, [3.0], unit=1, taus=[100])
    assert found[3.0].vectors == ("w",)


def test_memory_is_linear():
    many = [draw(400, 500, seed=n) for n in range(4)]
    ranked(many, 1000)
    tracemalloc.start()
    which, _ = ranked(many, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(which) == 1000
    assert peak < 2**20


def test_numbers_out_of_range():
    for changes, message in (
        ({"unit": 0}, "unit must be a finite number above 0, got 0"),
        ({"alpha": -1.0}, "alpha must be a finite number above 0"),
        ({"extra": -1}, "extra must be a number of parameters, 0 or more, got -1"),
        ({"budgets": [0.0]}, "budget 0.0 must be a finite number above 0"),
        ({"structured": {"c": 3}}, "matrices without a sensitivity: c"),
    ):
        given = {"structured": STRUCTURED, "budgets": [1.0], **changes}
        with pytest.raises(ValueError, match=message):
            choose(scores(), **given)


def test_scatter_and_its_gradient():
    values = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    dense = scatter(values, torch.tensor([5, 0]), (2, 3))
    assert dense.tolist() == [[-1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
    (dense * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert values.grad.tolist() == [5.0, 0.0]
