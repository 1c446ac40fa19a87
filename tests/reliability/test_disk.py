"""A disk that refuses writes ends a run cleanly and costs no earlier checkpoint."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import CheckpointError
from tests.diffusion.training_runs import PROMPT
from tests.distributed.faults import spoil_loss
from tests.reliability import harness
from tests.reliability.harness import Outcome, published, require_same_result, resumed, small_run

pytestmark = pytest.mark.row("R6")


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    return harness.train_to_the_end(small_run(tiny_base, tmp_path_factory.mktemp("whole")))


def require_refusal(outcome: Outcome, file: Path, why: str) -> None:
    """The script says in one line which file the disk refused, why, and where there is space."""
    assert outcome.code == 2, outcome.said[-3000:]
    assert "Traceback" not in outcome.said
    error = outcome.said.splitlines()[-1]
    assert f"{file}" in error
    assert f": {why}; the disk at " in error or f"({why}); the disk at " in error
    assert " MiB free" in error


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """A mount on `folder` while the test runs; skips where this process may not mount."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# -- file-size limits -----------------------------------------------------------------------------


def limited_after(step: int, size: int) -> Callable[[], None]:
    """An installer: once the checkpoint of `step` is there, no file may exceed `size` bytes."""

    def install() -> None:
        save = CheckpointFolder.save

        def then_limit(self: CheckpointFolder, at: int, *content: Any) -> Path:
            path = save(self, at, *content)
            if at == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return path

        CheckpointFolder.save = then_limit  # type: ignore[method-assign]

    return install


@pytest.mark.parametrize(
    "file, share",
    [
        ("log.jsonl", 0.2),
        ("checkpoints/step-000002/adapter.safetensors", 0.6),
        ("checkpoints/step-000002/adapter.safetensors", 0.999),
        ("checkpoints/step-000002/optimizer.safetensors", 0.999),
    ],
)
def test_file_size_limit(
    tiny_base: Path, tmp_path: Path, whole: Path, file: str, share: float
) -> None:
    """The limit is this share of the file that it must stop."""
    like = file.replace("step-000002", "step-000004")
    limit = int((whole / like).stat().st_size * share)
    settings = small_run(tiny_base, tmp_path)
    outcome = harness.run_script(settings, limited_after(1, limit))
    named = tmp_path / "run" / (file if "/" not in file else Path(file).parent)
    require_refusal(outcome, named, os.strerror(errno.EFBIG))
    assert "ulimit -f" in outcome.said
    assert published(tmp_path / "run") == [1]
    assert harness.litter(tmp_path / "run") == []
    harness.resume(settings, 1)
    require_same_result(settings, harness.adapter_digest(whole))


def test_file_size_limit_at_the_final_adapter(tiny_base: Path, tmp_path: Path, whole: Path) -> None:
    settings = small_run(tiny_base, tmp_path)
    size = (whole / harness.ADAPTER).stat().st_size - 1
    outcome = harness.run_script(settings, limited_after(settings.max_train_steps, size))
    require_refusal(outcome, tmp_path / "run" / harness.ADAPTER, os.strerror(errno.EFBIG))
    assert published(tmp_path / "run") == [4]
    assert not (tmp_path / "run" / harness.ADAPTER).exists()
    harness.resume(settings, 4)
    require_same_result(settings, harness.adapter_digest(whole))


def test_file_size_limit_at_a_final_lora(tiny_base: Path, tmp_path: Path) -> None:
    """That file is written by other libraries, whose errors are their own."""
    settings = small_run(tiny_base, tmp_path, method="lora", max_train_steps=2)
    outcome = harness.run_script(settings, limited_after(2, 4_000))
    assert outcome.code == 2, outcome.said[-3000:]
    assert "pytorch_lora_weights.safetensors could not be written: " in outcome.said
    assert "Traceback" not in outcome.said
    harness.assert_finished(harness.train(resumed(settings)))
    assert harness.litter(tmp_path / "run") == []


# -- no space -------------------------------------------------------------------------------------


def test_full_file_system(tiny_base: Path, tmp_path: Path, whole: Path) -> None:
    """1 MB takes some of the checkpoints that are all to be kept, then no more."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "none") as disk:
        settings = small_run(
            tiny_base,
            tmp_path,
            output_dir=str(disk / "run"),
            checkpoints_total_limit=None,
            max_train_steps=12,
        )
        outcome = harness.run_script(settings, beside=tmp_path / "run")
        steps = published(disk / "run")
        assert 2 <= len(steps) < 12
        assert steps == list(range(1, len(steps) + 1))
        failed = disk / "run" / "checkpoints" / f"step-{steps[-1] + 1:06d}"
        require_refusal(outcome, failed, os.strerror(errno.ENOSPC))
        assert f"the disk at {disk} has 0.0 of 1.0 MiB free; free space there" in outcome.said
        assert harness.litter(disk / "run") == []


def test_no_space_for_a_sample_sheet(tiny_base: Path, tmp_path: Path) -> None:
    """A picture is not worth the run: the reason is noted and the training goes on."""

    def install() -> None:
        def full(self: Image.Image, *arguments: Any, **more: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        Image.Image.save = full  # type: ignore[method-assign]

    settings = small_run(tiny_base, tmp_path, validation_prompt=PROMPT, max_train_steps=2)
    harness.assert_finished(harness.train(settings, install))
    notes = [e["message"] for e in harness.events(tmp_path / "run") if e["event"] == "note"]
    why = os.strerror(errno.ENOSPC)
    assert any(f"step-000000.png could not be written: {why}; the disk" in note for note in notes)
    assert harness.litter(tmp_path / "run") == []


def test_no_space_for_the_last_good_state(tiny_base: Path, tmp_path: Path) -> None:
    """NaN is why the run ended, and stays the reason and the exit code that are told."""

    def install() -> None:
        def full(self: CheckpointFolder, *content: Any) -> Path:
            raise CheckpointError("the disk is full")

        CheckpointFolder.save = full  # type: ignore[method-assign]
        spoil_loss(2)

    settings = small_run(tiny_base, tmp_path, checkpointing_steps=None)
    outcome = harness.run_script(settings, install)
    assert outcome.code == 3, outcome.said[-3000:]
    assert "the loss is nan at step 2, " in outcome.said
    assert "The last good state could not be saved: the disk is full" in outcome.said


# -- no permission --------------------------------------------------------------------------------


def test_read_only_folder(tiny_base: Path, tmp_path: Path, whole: Path) -> None:
    """A bind mount, for permission bits do not bind root."""
    settings = small_run(tiny_base, tmp_path, checkpoints_total_limit=3)
    folder = harness.train_to_the_end(settings)
    (folder / harness.ADAPTER).unlink()
    with mounted(folder, "--bind", str(folder)):
        remount = ["mount", "-o", "remount,ro,bind", str(folder)]
        subprocess.run(remount, check=True)
        outcome = harness.run_script(resumed(settings))
        require_refusal(outcome, folder / "log.jsonl", os.strerror(errno.EROFS))
        assert published(folder) == [2, 3, 4]
        elsewhere = TrainConfig(**{**vars(settings), "output_dir": str(folder / "new")})
        outcome = harness.run_script(elsewhere, beside=folder)
        require_refusal(outcome, folder / "new", os.strerror(errno.EROFS))
    harness.resume(settings, 4)
    require_same_result(settings, harness.adapter_digest(whole))


def test_a_prune_that_is_refused_keeps_what_is_published(tmp_path: Path, monkeypatch: Any) -> None:
    folder = CheckpointFolder(tmp_path, limit=1)
    folder.save(1, {}, {})

    def refuse(self: Path, target: Path) -> Path:
        if ".tmp-" in target.name and self.name == "step-000001":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        CheckpointError, match="step-000001 is beyond the limit of 1, but could not be"
    ):
        folder.save(2, {}, {})
    assert folder.steps() == [1, 2]
