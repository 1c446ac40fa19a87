"""Interrupted runs resume exactly, with the same settings and data only; savers change nothing."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.prior import ClassImages, complete_images
from snell_diffusion.diffusion.training import run
from snell_diffusion.training.errors import CheckpointError, Interrupted, OutputError
from snell_diffusion.training.tracking import read_log
from tests.diffusion.training_runs import (
    CLASS_PROMPT,
    FULL,
    SIDE,
    adapter,
    config,
    tree,
    write_photos,
)


@pytest.mark.parametrize("everything", [False, True])
def test_interrupted_and_resumed_is_bit_identical(
    tiny_base: Path, tmp_path: Path, everything: bool
) -> None:
    """Stopped after step 3, between two checkpoints: weights, average, levels and log are equal."""
    options = FULL if everything else {"cache_latents": False, "center_crop": False}
    options = {**options, "sample_steps": None, "validation_steps": None, "sample_prompts": []}
    whole = config(tiny_base, tmp_path / "whole", **options)
    run(whole)
    parts = config(tiny_base, tmp_path / "parts", **options)

    def stop_after_three(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 3, the state is in") as stopped:
        run(parts, stop_after_three)
    assert stopped.value.exit_code == 143
    status = json.loads((Path(parts.output_dir) / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 3)
    run(replace(parts, resume_from_checkpoint="latest"))
    assert adapter(Path(parts.output_dir)) == adapter(Path(whole.output_dir))
    last = "checkpoints/step-000004"
    for name in ("adapter", "optimizer", "competition"):
        file = f"{last}/{name}.safetensors"
        assert (Path(parts.output_dir) / file).read_bytes() == (
            Path(whole.output_dir) / file
        ).read_bytes()
    losses = [
        [e["loss"] for e in read_log(Path(c.output_dir) / "log.jsonl") if e["event"] == "step"]
        for c in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_pictures_and_checkpoints_do_not_change_the_training(
    full: Any, tiny_base: Path, tmp_path: Path
) -> None:
    settings, result, _ = full
    quiet = replace(
        settings,
        output_dir=str(tmp_path / "run"),
        sample_steps=None,
        validation_steps=None,
        sample_prompts=[],
        validation_prompt=None,
        checkpointing_steps=None,
    )
    run(quiet)
    assert adapter(tmp_path / "run") == adapter(result.output_dir)


def test_resume_of_a_finished_run_only_writes_the_results_again(full: Any) -> None:
    settings, result, _ = full
    before = adapter(result.output_dir)
    again = run(replace(settings, resume_from_checkpoint="latest"))
    assert adapter(result.output_dir) == before
    assert again.validation_loss_after == result.validation_loss_after
    assert not [e for e in again.history if e["event"] == "step"]


def test_resume_with_other_settings_is_refused_field_by_field(full: Any) -> None:
    settings, result, _ = full
    before = tree(result.output_dir)
    changed = replace(settings, learning_rate=0.5, seed=3, resume_from_checkpoint="latest")
    with pytest.raises(
        CheckpointError, match=r"learning_rate: 0.01 then, 0.5 now; seed: 0 then, 3"
    ):
        run(changed)
    assert tree(result.output_dir) == before


def test_resume_with_other_photos_is_refused(full: Any, tmp_path: Path) -> None:
    settings, _, _ = full
    other = write_photos(tmp_path / "photos", 5)
    changed = replace(settings, instance_data_dir=str(other), resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match=r"belongs to a run with other settings: photos: "):
        run(changed)


def test_resume_with_other_class_images_is_refused(full: Any, tmp_path: Path) -> None:
    settings, result, _ = full
    shutil.copytree(result.output_dir, tmp_path / "run")
    for image in (tmp_path / "run" / "class_images").glob("*.png"):
        Image.new("RGB", (SIDE, SIDE)).save(image)
    again = replace(settings, output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match="are not those that the interrupted run trained on"):
        run(again)


def test_class_images_that_cannot_be_kept_are_a_clean_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = TrainConfig(instance_data_dir="x", instance_prompt="x")
    images = ClassImages(tmp_path / "file" / "class", CLASS_PROMPT, 2)
    with pytest.raises(OutputError, match=r"generated.json could not be written: Not a directory"):
        complete_images(settings, images, None, print)  # type: ignore[arg-type]


def test_resume_needs_a_checkpoint_unless_auto(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, max_train_steps=1)
    with pytest.raises(
        CheckpointError, match=r"'latest', but .* holds no valid checkpoint; use 'au"
    ):
        run(replace(settings, resume_from_checkpoint="latest"))
    with pytest.raises(CheckpointError, match=r"no checkpoint folder nowhere; name one in full"):
        run(replace(settings, resume_from_checkpoint="nowhere"))
    assert not (tmp_path / "run").exists()
    assert run(replace(settings, resume_from_checkpoint="auto")).adapter_path is not None


def test_resume_steps_back_over_a_damaged_checkpoint(
    full: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, result, _ = full
    shutil.copytree(result.output_dir, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-000004/optimizer.safetensors").write_bytes(b"")
    again = replace(settings, output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    outcome = run(again)
    notes = [e["message"] for e in outcome.history if e["event"] == "note"]
    assert any("optimizer.safetensors is damaged" in note for note in notes)
    assert [e["step"] for e in outcome.history if e["event"] == "step"] == [3, 4]
    assert adapter(tmp_path / "run") == adapter(result.output_dir)


@pytest.mark.parametrize(
    "change",
    [{"cache_latents": False}, {"gradient_checkpointing": True}],
    ids=lambda c: next(iter(c)),
)
def test_memory_savers_do_not_change_the_losses(
    tiny_base: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    histories = []
    for name, options in (("plain", {}), ("saving", change)):
        settings = config(tiny_base, tmp_path / name, max_train_steps=2, method="lora", **options)
        histories.append([e["loss"] for e in run(settings).history if e["event"] == "step"])
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-4)
