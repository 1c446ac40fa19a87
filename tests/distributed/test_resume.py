"""A run that died goes on, on as many processes or on another number with the same global batch."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.config import TrainConfig
from tests.distributed.faults import before_loss
from tests.distributed.ranks import (
    adapter,
    largest_difference,
    ten_steps,
    train_on,
    train_to_the_end,
)
from tests.reliability.harness import ADAPTER, copy_run, published

pytestmark = pytest.mark.row("D3")

GLOBAL_BATCH = 2


def settings_of(base: Path, folder: Path, processes: int) -> TrainConfig:
    return ten_steps(
        base, folder, train_batch_size=GLOBAL_BATCH // processes, checkpointing_steps=5
    )


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Undisturbed runs by number of processes: settings and report."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {n: settings_of(tiny_base, folder / str(n), n) for n in (1, 2)}
    return {n: (settings, train_to_the_end(n, settings)[0]) for n, settings in runs.items()}


@pytest.fixture(scope="module")
def dead(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, TrainConfig]:
    """Runs that died in step 7, with a checkpoint of step 5, by number of processes."""
    folder = tmp_path_factory.mktemp("dead")
    runs = {n: settings_of(tiny_base, folder / str(n), n) for n in (1, 2)}
    for processes, settings in runs.items():
        ended = train_on(processes, settings, lambda rank: before_loss(7, lambda: os._exit(77)))
        assert [e.code for e in ended] == [77] * processes
        assert published(Path(settings.output_dir)) == [5]
    return runs


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2)])
def test_a_dead_run_goes_on(
    whole: dict[int, Any],
    dead: dict[int, TrainConfig],
    tmp_path: Path,
    row: Any,
    before: int,
    after: int,
) -> None:
    folder = copy_run(Path(dead[before].output_dir), tmp_path / "run")
    settings = dataclasses.replace(
        dead[before],
        output_dir=str(folder),
        train_batch_size=GLOBAL_BATCH // after,
        resume_from_checkpoint="latest",
    )
    reports = train_to_the_end(after, settings)
    uninterrupted, report = whole[before]
    difference = largest_difference(adapter(uninterrupted), adapter(settings))
    row.figure(f"{before} to {after}: largest difference {difference:.1e}")
    for resumed in reports:
        assert resumed["keep"] == report["keep"]
    if before == after:
        assert [r["adapter"] for r in reports] == [report["adapter"]] * after
        assert [r["allocator"] for r in reports] == [report["allocator"]] * after
        assert [r["optimizer"] for r in reports] == [report["optimizer"]] * after
        ours, theirs = Path(settings.output_dir), Path(uninterrupted.output_dir)
        assert (ours / ADAPTER).read_bytes() == (theirs / ADAPTER).read_bytes()
    assert difference <= 1e-6


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_checkpoint_holds_does_not_depend_on_who_reads_it(
    whole: dict[int, Any], tmp_path: Path, processes: int
) -> None:
    """A finished run of 2 processes, opened again by 1 or 2: nothing is left to do."""
    settings, report = whole[2]
    folder = copy_run(Path(settings.output_dir), tmp_path / "run")
    again = dataclasses.replace(
        settings,
        output_dir=str(folder),
        train_batch_size=GLOBAL_BATCH // processes,
        resume_from_checkpoint="latest",
    )
    for reader in train_to_the_end(processes, again):
        for part in ("step", "adapter", "optimizer", "allocator"):
            assert reader[part] == report[part], part
