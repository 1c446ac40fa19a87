"""All processes give the layers the same levels, or all of them stop."""

from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.core import Allocator
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.tuners import Competition
from tests.distributed.faults import after_allocation
from tests.distributed.ranks import Clock, digest, ten_steps, train_on, train_to_the_end

pytestmark = pytest.mark.row("D2")


def levels(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What a process exchanged about levels: (what, digest) at each allocation."""
    return [(what, found) for what, found in report["exchanged"] if "levels" in what]


def test_levels_agree_at_every_allocation_though_the_data_differ(
    tiny_base: Path, tmp_path: Path, row: Any
) -> None:
    def note_local_gradients(rank: int) -> None:
        average = Parallel.average_gradients

        def noted(self: Parallel, parameters: Any) -> None:
            own = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
            with (tmp_path / f"gradients{rank}").open("a") as file:
                file.write(digest(own) + "\n")
            average(self, parameters)

        Parallel.average_gradients = noted  # type: ignore[method-assign]

    settings = ten_steps(tiny_base, tmp_path, train_batch_size=1)
    first, second = train_to_the_end(2, settings, install=note_local_gradients)
    own = [(tmp_path / f"gradients{rank}").read_text().split() for rank in (0, 1)]
    assert len(own[0]) == 10
    assert not set(own[0]) & set(own[1]), "both processes saw the same data"
    found = levels(first)
    assert found == levels(second)
    assert len({level for _, level in found}) >= 5
    row.figure(f"{len(found)} allocations with equal digests")


def test_levels_agree_where_all_scores_tie(tiny_base: Path, tmp_path: Path) -> None:
    def tie(rank: int) -> None:
        Allocator._raw_scores = lambda self: dict.fromkeys(self.sizes, 1.0)  # type: ignore[method-assign]

    settings = ten_steps(tiny_base, tmp_path, train_batch_size=1)
    first, second = train_to_the_end(2, settings, install=tie)
    assert levels(first) == levels(second)
    assert len({level for _, level in levels(first)}) >= 5
    assert first["keep"] == second["keep"]


def one_entry_more(competition: Competition) -> None:
    layer = next(iter(competition.layers.values()))
    size = layer.in_features * layer.out_features
    layer.set_sparsity("default", layer.sparsity("default") - 1 / size)


def no_level_at_all(competition: Competition) -> None:
    for layer in competition.layers.values():
        layer.set_sparsity("default", 0.0)


@pytest.mark.parametrize("difference", [one_entry_more, no_level_at_all])
def test_every_process_stops_where_one_differs(
    tiny_base: Path, tmp_path: Path, row: Any, difference: Any
) -> None:
    def differ(rank: int) -> None:
        if rank == 1:
            after_allocation(5, difference)

    settings = ten_steps(tiny_base, tmp_path, train_batch_size=1)
    clock = Clock()
    ended = train_on(2, settings, install=differ)
    assert clock.seconds() <= 30
    row.figure(f"all processes stopped after {clock.seconds():.0f} s")
    for process in ended:
        assert process.code == 4, process.said[-3000:]
        assert "DivergedError: the processes disagree about the layers' levels after step 5" in (
            process.said
        )
        assert process.report["step"] == 5
