"""What --dry_run tells: the peak of every phase, the size of a checkpoint, the time of the run."""

import re
from pathlib import Path

import pytest

from snell_diffusion.diffusion.training import run
from tests.diffusion.training_runs import PROMPT, config


def test_every_phase_is_told(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tiny_base, tmp_path, dry_run=True, validation_prompt=PROMPT, ema_decay=0.9)
    result = run(settings)
    assert not Path(settings.output_dir).exists()
    (peaks,) = [e for e in result.history if e["event"] == "peaks"]
    phases = ["load", "text", "latents", "train", "sample", "decode", "checkpoint"]
    assert sorted(peaks.keys() - {"event"}) == sorted(phases)
    assert all(peaks[phase] > 2**20 for phase in phases)
    shown = capsys.readouterr().out
    assert re.search(r"one step: [\d.]+ s; 4 steps take about \d+:\d\d:\d\d", shown)
    assert re.search(r"a training step: [\d.]+ GiB", shown)
    # Two moments and an average of everything trained, beside the values themselves.
    told = float(re.search(r"one checkpoint: ([\d.]+) MiB", shown)[1])  # type: ignore[index]
    assert told == pytest.approx(4 * 4 * result.sizes.trainable / 2**20, abs=0.1)


def test_a_run_without_pictures_draws_none(tiny_base: Path, tmp_path: Path) -> None:
    result = run(config(tiny_base, tmp_path, dry_run=True, max_train_steps=1))
    (peaks,) = [e for e in result.history if e["event"] == "peaks"]
    assert not {"sample", "decode"} & peaks.keys()
