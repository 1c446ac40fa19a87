"""One process of several fails: all of them end, and what is on disk is sound."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.inputs import Photos
from tests.distributed.faults import before_loss, before_publishing, die, spoil_loss
from tests.distributed.ranks import (
    Clock,
    digest,
    ten_steps,
    train_on,
    train_to_the_end,
)
from tests.reliability.harness import ADAPTER, adapter_digest, checkpoints, copy_run, published


def run_of(base: Path, folder: Path, **changes: Any) -> TrainConfig:
    values = {"max_train_steps": 6, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    return ten_steps(base, folder, **{**values, "train_batch_size": 1, **changes})


def lose_connection() -> None:
    raise RuntimeError("planted: this process cannot go on")


def killed_in_a_step(rank: int) -> None:
    if rank == 1:
        before_loss(4, die)


def killed_in_a_save(rank: int) -> None:
    if rank == 0:
        before_publishing(4, die)


def raises(rank: int) -> None:
    if rank == 1:
        before_loss(4, lose_connection)


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run on two processes that nothing happens to."""
    settings = run_of(tiny_base, tmp_path_factory.mktemp("undisturbed"))
    train_to_the_end(2, settings)
    return Path(settings.output_dir)


@pytest.mark.row("D6")
@pytest.mark.parametrize("fault", [killed_in_a_step, killed_in_a_save, raises])
def test_all_processes_end_when_one_does(
    tiny_base: Path, tmp_path: Path, undisturbed: Path, row: Any, fault: Callable[[int], None]
) -> None:
    settings = run_of(tiny_base, tmp_path)
    clock = Clock()
    ended = train_on(2, settings, install=fault)
    seconds = clock.seconds()
    assert all(e.code != 0 for e in ended), [e.code for e in ended]
    assert seconds <= 60
    row.figure(f"all ended after {seconds:.0f} s")
    assert published(Path(settings.output_dir)) == [1, 2, 3]
    train_to_the_end(2, dataclasses.replace(settings, resume_from_checkpoint="latest"))
    assert adapter_digest(Path(settings.output_dir)) == adapter_digest(undisturbed)


@pytest.mark.row("D6")
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    tiny_base: Path, tmp_path: Path
) -> None:
    def signalled(rank: int) -> None:
        if rank == 1:
            before_loss(3, lambda: os.kill(os.getpid(), signal.SIGTERM))

    settings = run_of(tiny_base, tmp_path, checkpointing_steps=None)
    ended = train_on(2, settings, install=signalled)
    assert [e.code for e in ended] == [143, 143], "\n".join(e.said[-2000:] for e in ended)
    assert [e.report["step"] for e in ended] == [3, 3]
    assert published(Path(settings.output_dir)) == [3]


def test_processes_that_start_from_different_files_stop(tiny_base: Path, tmp_path: Path) -> None:
    """As on machines without a shared disk: other photos, another base, another checkpoint."""

    def other_photos(rank: int) -> None:
        if rank == 1:
            Photos.digest = lambda self: "other photos"  # type: ignore[method-assign]

    settings = run_of(tiny_base, tmp_path)
    for process in train_on(2, settings, install=other_photos):
        assert process.code == 4, process.said[-3000:]
        assert "DivergedError: the processes disagree about settings, photos, base or" in (
            process.said
        )
    assert not Path(settings.output_dir).exists()


def test_a_checkpoint_that_is_refused_is_named_by_every_process(
    tiny_base: Path, tmp_path: Path
) -> None:
    """The first process looks first; the others must not end with a lost connection."""
    settings = run_of(tiny_base, tmp_path, resume_from_checkpoint=str(tmp_path / "nowhere"))
    for process in train_on(2, settings):
        assert process.code == 2, process.said[-3000:]
        assert "CheckpointError: there is no checkpoint folder " in process.said
        assert "Traceback" not in process.said
    assert not Path(settings.output_dir).exists()


@pytest.mark.row("D7")
def test_nan_on_one_process_stops_all_before_the_update(
    tiny_base: Path, tmp_path: Path, undisturbed: Path, row: Any
) -> None:
    def spoil(rank: int) -> None:
        if rank == 1:
            spoil_loss(4)

    settings = run_of(tiny_base, tmp_path / "nan")
    ended = train_on(2, settings, install=spoil)
    for process in ended:
        assert process.code == 3, process.said[-3000:]
        assert "the loss is nan at step 4" in process.said
        assert process.report["step"] == 3
    assert ended[0].report["adapter"] == ended[1].report["adapter"]
    assert published(Path(settings.output_dir)) == [1, 2, 3]
    kept, expected = (
        checkpoints(folder).load(checkpoints(folder).path(3)).tensors
        for folder in (Path(settings.output_dir), undisturbed)
    )
    for group, tensors in expected.items():
        assert digest(kept[group]) == digest(tensors), group
    row.figure("both stopped at step 4 with the weights of step 3")


def note_writes(folder: Path) -> Callable[[int], None]:
    """Note everything that a process opens for writing, makes, renames or removes."""

    def install(rank: int) -> None:
        changing = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
        notes = os.open(
            folder.parent / f"writes{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )

        def hook(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in changing) and str(args[0]).startswith(f"{folder}/"):
                os.write(notes, f"{event} {args[0]}\n".encode())

        sys.addaudithook(hook)

    return install


@pytest.mark.row("D7")
@pytest.mark.parametrize("strategy", ["", "FSDP"])
def test_only_the_first_process_writes(tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    settings = run_of(
        tiny_base,
        tmp_path,
        max_train_steps=2,
        with_prior_preservation=True,
        class_prompt="a cat",
        num_class_images=2,
        validation_prompt="a sks cat",
    )
    folder = Path(settings.output_dir)
    train_to_the_end(2, settings, install=note_writes(folder), strategy=strategy)
    again = dataclasses.replace(settings, resume_from_checkpoint="latest")
    train_to_the_end(2, again, install=note_writes(folder), strategy=strategy)
    first, second = ((tmp_path / f"writes{rank}").read_text() for rank in (0, 1))
    for name in ("config.yaml", "log.jsonl", "class_images", "checkpoints", "samples", ADAPTER):
        assert name in first
    assert second == ""


@pytest.mark.row("D7")
def test_the_adapter_file_does_not_depend_on_who_writes_it(
    tiny_base: Path, tmp_path: Path, row: Any
) -> None:
    """The same final state, written by one process, by two, and beside a sharded base."""
    one = run_of(tiny_base, tmp_path / "one", train_batch_size=2)
    train_to_the_end(1, one)
    expected = (Path(one.output_dir) / ADAPTER).read_bytes()
    for processes, strategy in ((1, ""), (2, ""), (2, "FSDP")):
        folder = copy_run(Path(one.output_dir), tmp_path / f"{processes}{strategy}")
        (folder / ADAPTER).unlink()
        settings = dataclasses.replace(
            one,
            output_dir=str(folder),
            train_batch_size=2 // processes,
            resume_from_checkpoint="latest",
        )
        train_to_the_end(processes, settings, strategy=strategy)
        assert (folder / ADAPTER).read_bytes() == expected
    row.figure("adapter file equal byte for byte from 1, 2 and 2 sharded processes")
