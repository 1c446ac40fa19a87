"""The same settings give the same adapter file, whatever else goes on around the training."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.config_files import config_text
from tests.diffusion.training_runs import PROMPT
from tests.reliability import harness
from tests.reliability.harness import adapter_digest, small_run

pytestmark = pytest.mark.row("X")

SETTINGS: dict[str, Any] = {
    "max_train_steps": 3,
    "train_batch_size": 2,
    "random_flip": True,
    "ema_decay": 0.9,
    "dropout": 0.1,
}


def digest(base: Path, folder: Path, **changes: Any) -> str:
    return adapter_digest(harness.train_to_the_end(small_run(base, folder, **SETTINGS, **changes)))


@pytest.fixture(scope="module")
def expected(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(tiny_base, tmp_path_factory.mktemp("expected"))


def test_repeat(tiny_base: Path, tmp_path: Path, expected: str) -> None:
    assert digest(tiny_base, tmp_path) == expected
    assert digest(tiny_base, tmp_path / "other", seed=1) != expected


def test_workers(tiny_base: Path, tmp_path: Path) -> None:
    uncached = {"cache_latents": False, "center_crop": False}
    without = digest(tiny_base, tmp_path / "0", dataloader_num_workers=0, **uncached)
    assert digest(tiny_base, tmp_path / "2", dataloader_num_workers=2, **uncached) == without


def test_checkpoints_every_step_or_never(tiny_base: Path, tmp_path: Path, expected: str) -> None:
    assert digest(tiny_base, tmp_path, checkpointing_steps=None) == expected


def test_pictures_and_measurements(tiny_base: Path, tmp_path: Path) -> None:
    held_out = {"num_validation_photos": 1}
    quiet = digest(tiny_base, tmp_path / "quiet", **held_out)
    watched = {"validation_steps": 1, "sample_steps": 1, "validation_prompt": PROMPT}
    assert digest(tiny_base, tmp_path / "watched", **held_out, **watched) == quiet


def command(base: Path, folder: Path) -> list[str]:
    """The script in a new interpreter."""
    settings = small_run(base, folder, **SETTINGS)
    path = folder / "settings.yaml"
    path.write_text(config_text(settings), "utf-8")
    return [sys.executable, "train_dreambooth_snella.py", "--config", str(path)]


@pytest.mark.parametrize("hash_seed", ["0", "1", "4711"])
def test_hash_seed(
    tiny_base: Path, tmp_path: Path, expected: str, repo_root: Path, hash_seed: str
) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        command(tiny_base, tmp_path),
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert adapter_digest(tmp_path / "run") == expected


def test_two_threads_differ_in_the_last_bits_only(tiny_base: Path, tmp_path: Path, row) -> None:
    """More threads add in another order: losses of float32 runs stay within 1e-5, relatively."""
    import torch

    one = harness.train_to_the_end(small_run(tiny_base, tmp_path / "1", **SETTINGS))
    two = small_run(tiny_base, tmp_path / "2", **SETTINGS)
    harness.assert_finished(harness.train(two, lambda: torch.set_num_threads(2)))
    pairs = zip(harness.losses(one), harness.losses(tmp_path / "2" / "run"), strict=True)
    worst = max(abs(a - b) / a for a, b in pairs)
    assert worst <= 1e-5
    row.figure(f"1 or 2 threads: losses within {worst:.1e}, all else bit-identical")
