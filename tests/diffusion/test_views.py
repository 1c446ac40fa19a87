"""Pixels are the same whoever reads them, and the processes that read ahead bother nobody."""

import atexit
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import find_photos
from snell_diffusion.diffusion.training import run
from snell_diffusion.diffusion.views import Draws, PixelReader
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import Interrupted
from tests.diffusion.training_runs import CLASS_PROMPT, PROMPT, config, write_photos

UNCACHED: dict[str, Any] = {
    "cache_latents": False,
    "center_crop": False,
    "random_flip": True,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 3,
    "dropout": 0.1,
    "num_validation_photos": 0,
}


def reader(folder: Path, workers: int, steps: int = 3) -> PixelReader:
    """Two streams, 3 photos and 4 photos, of batch 2."""
    changes = {**UNCACHED, "dataloader_num_workers": workers, "max_train_steps": steps}
    settings = config(folder, folder, **changes)
    streams = []
    for name, count in (("instance", 3), ("class", 4)):
        photos = find_photos(write_photos(folder / name, count), PROMPT)
        streams.append(Draws(settings, name, photos, 2, rank=0, world=1))
    return PixelReader(streams, settings)


def everything(source: PixelReader, first: int = 1, last: int = 3) -> list[torch.Tensor]:
    places = [(step, micro) for step in range(first, last + 1) for micro in (0, 1)]
    return [stream for place in places for stream in source(*place)]


def workers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.is_running()]


@pytest.mark.parametrize("first", [1, 2])
def test_workers_read_the_same_pixels(tmp_path: Path, first: int) -> None:
    """Also from a step in the middle on, as after a resume, and when asked for a batch twice."""
    alone, helped = reader(tmp_path, 0), reader(tmp_path, 2)
    try:
        torch.manual_seed(0)
        expected, found = everything(alone, first), everything(helped, first)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(0)))
        assert len(workers()) == 2
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert {tuple(pixels.shape) for pixels in found} == {(2, 3, 16, 16)}
        again = helped(first, 1)
        assert all(torch.equal(a, b) for a, b in zip(again, alone(first, 1), strict=True))
    finally:
        helped.close()
    assert workers() == []


def test_a_process_reads_its_places_of_the_global_batch(tmp_path: Path) -> None:
    """Rank 0 and rank 1 of two read, in turn, what one process with a double batch reads."""
    settings = config(tmp_path, tmp_path, **UNCACHED)
    photos = find_photos(write_photos(tmp_path / "photos", 5), PROMPT)
    whole = Draws(settings, "instance", photos, 4, 0, 1)
    parts = [Draws(settings, "instance", photos, 2, rank, 2) for rank in (0, 1)]
    for step, micro in ((1, 0), (2, 1), (7, 1)):
        halves = torch.cat([part.read(step, micro) for part in parts])
        assert torch.equal(halves, whole.read(step, micro))


def test_photos_that_vanish_are_named(tmp_path: Path) -> None:
    for count in (0, 1):
        source = reader(tmp_path / str(count), count)
        for photo in (tmp_path / str(count) / "class").iterdir():
            photo.unlink()
        with pytest.raises(
            SnellaConfigError, match=r"photo '.*png' is missing.*: put it back"
        ) as e:
            source(1, 0)
        assert "Traceback" not in str(e.value)
        source.close()


def test_a_photo_that_was_exchanged_is_named(tmp_path: Path) -> None:
    """Trained on, it would make the run another one than its checkpoints say."""
    source = reader(tmp_path, 0)
    photos = sorted((tmp_path / "class").iterdir())
    for photo in photos[1:]:
        photo.write_bytes(photos[0].read_bytes())
    with pytest.raises(SnellaConfigError, match=r"holds other bytes than before.*: put it back"):
        _ = [source(step, 0) for step in (1, 2, 3)]


def test_workers_leave_signals_to_the_training_process(tmp_path: Path) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group."""
    source = reader(tmp_path, 2, steps=20)  # far more than what is read ahead
    source(1, 0)
    source(1, 1)
    try:
        for worker in workers():
            for signum in (signal.SIGINT, signal.SIGTERM):
                worker.send_signal(signum)
        assert len(everything(source, 2, 20)) == 76
        assert len(workers()) == 2
    finally:
        source.close()
    assert workers() == []


def test_workers_end_when_the_training_process_is_killed(tmp_path: Path) -> None:
    """Within the five seconds after which a worker looks for its parent."""
    inside, outside = os.pipe()
    child = os.fork()
    if not child:
        try:
            source = reader(tmp_path, 2)
            source(1, 0)
            os.write(outside, " ".join(str(w.pid) for w in workers()).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    pids = [int(word) for word in os.read(inside, 100).split()]
    assert len(pids) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    end = time.monotonic() + 15
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < end, "workers outlived the training process"
        time.sleep(0.1)


def test_workers_end_with_a_process_that_never_closed_them(tmp_path: Path) -> None:
    """Python waits at its end for children, and these ignore the signal it sends them."""
    child = os.fork()
    if not child:
        try:
            source = reader(tmp_path, 1)
            source(1, 0)
            atexit._run_exitfuncs()  # what an interpreter does at its end
        finally:
            os._exit(0)
    end = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the process did not end")
        time.sleep(0.05)


def trained(settings: TrainConfig) -> bytes:
    result = run(settings)
    assert result.adapter_path is not None
    return result.adapter_path.read_bytes()


def test_a_run_is_bit_identical_with_workers(tiny_base: Path, tmp_path: Path) -> None:
    """With class images, crops, flips, accumulation and dropout; also stopped in mid-epoch."""
    more = {
        **UNCACHED,
        "with_prior_preservation": True,
        "class_prompt": CLASS_PROMPT,
        "class_data_dir": str(write_photos(tmp_path / "class", 3)),
        "num_class_images": 3,
        "class_batch_size": 1,
    }
    alone = trained(config(tiny_base, tmp_path / "alone", **more))
    helped = config(tiny_base, tmp_path / "helped", **more, dataloader_num_workers=2)
    seen = []

    def stop_after_one(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            seen.append(len(workers()))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(helped, stop_after_one)
    assert seen == [2]
    assert workers() == []
    assert trained(replace(helped, resume_from_checkpoint="latest")) == alone
    assert workers() == []


def test_no_worker_starts_where_latents_are_cached(tiny_base: Path, tmp_path: Path) -> None:
    seen: list[psutil.Process] = []
    settings = config(tiny_base, tmp_path, max_train_steps=1, dataloader_num_workers=2)
    run(settings, lambda event: seen.extend(workers()))
    assert seen == []
