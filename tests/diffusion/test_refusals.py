"""What a run refuses, and how it ends when a step fails: nothing is lost either way."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaBaseError, SnellaConfigError
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import NonFiniteError
from tests.diffusion.training_runs import FULL, PROMPT, config, tree, write_photos

# -- refusals: nothing is lost --------------------------------------------------------------------


def test_a_finished_run_is_not_overwritten_by_accident(full: Any) -> None:
    settings, result, _ = full
    before = tree(result.output_dir)
    with pytest.raises(SnellaConfigError, match=r"holds an earlier run .*--overwrite"):
        run(settings)
    assert tree(result.output_dir) == before


def test_a_folder_in_use_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, overwrite=True)
    (tmp_path / "run").mkdir()
    status = {"pid": 1, "state": "training"}  # process 1 always lives
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))
    with pytest.raises(SnellaConfigError, match="is in use by process 1; wait, stop it, or choose"):
        run(settings)


def test_a_folder_taken_while_the_model_loads_is_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_base, tmp_path, overwrite=True)
    status = tmp_path / "run" / "status.json"
    load = training.build_model

    def slow(*arguments: Any) -> Any:
        status.parent.mkdir()
        status.write_text(json.dumps({"pid": 1, "state": "training"}))
        return load(*arguments)

    monkeypatch.setattr(training, "build_model", slow)
    with pytest.raises(SnellaConfigError, match="is in use by process 1; wait, stop it, or choose"):
        run(settings)
    assert [path.name for path in status.parent.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"instance_data_dir": "bad"}, SnellaConfigError, "1 bad file.*broken.jpg"),
        (
            {"pretrained_model_name_or_path": "no/such"},
            SnellaBaseError,
            "neither a folder here nor",
        ),
        ({"target_modules": ["nothing_like_it"]}, SnellaConfigError, "unet cannot be adapted"),
        ({"optimizer": "NoSuch"}, SnellaConfigError, "optimizer 'NoSuch' was not found"),
        ({"heads": 3}, SnellaConfigError, "method snella: r must be divisible by heads"),
        ({"alloc_init_warmup": 99}, SnellaConfigError, "competition cannot be scheduled: total"),
        ({"method": "lora", "heads": 2}, SnellaConfigError, "method lora has no heads; it takes"),
        ({"method": "adalora", "max_train_steps": 1}, SnellaConfigError, "2 optimizer steps or"),
        ({"num_validation_photos": 4}, SnellaConfigError, "holds 4 photos; at least one must be"),
        ({"report_to": "wandb"}, SnellaConfigError, "not installed: pip install wandb"),
        ({"mixed_precision": "fp16"}, SnellaConfigError, "fp16 needs a GPU"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_loses_nothing_even_with_overwrite(
    tiny_base: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "fp16" in change.values() and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = config(tiny_base, tmp_path, overwrite=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pytorch_snella_weights.safetensors").write_bytes(b"precious")
    if "instance_data_dir" in change:
        folder = write_photos(tmp_path / "bad")
        (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
        change = {"instance_data_dir": str(folder)}
    with pytest.raises(error, match=message):
        run(replace(settings, **change))
    assert tree(tmp_path / "run") == {"pytorch_snella_weights.safetensors": b"precious"}


def test_overwrite_replaces_our_files_and_leaves_others(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    for name in ("notes.txt", "loss.png", "samples/step-000900.png"):
        (folder / name).write_bytes(b"old")
    run(config(tiny_base, tmp_path, overwrite=True, max_train_steps=1))
    assert (folder / "notes.txt").read_bytes() == b"old"
    assert (folder / "loss.png").read_bytes() != b"old"
    assert not (folder / "samples/step-000900.png").exists()


@pytest.mark.parametrize("wanted, trial", [(5, False), (3, False), (3, True)])
def test_class_images_of_another_recipe_are_refused(
    full: Any, tiny_base: Path, tmp_path: Path, wanted: int, trial: bool
) -> None:
    """Before anything is written, and also where no more are to be generated."""
    _, result, _ = full
    settings = config(
        tiny_base,
        tmp_path,
        class_data_dir=str(result.output_dir / "class_images"),
        class_prompt="a dog",
        with_prior_preservation=True,
        num_class_images=wanted,
        dry_run=trial,
    )
    with pytest.raises(
        SnellaConfigError, match="generated with prompt 'a cat', this run has 'a do"
    ):
        run(settings)
    assert not (tmp_path / "run").exists()


def test_dry_run_checks_all_and_writes_nothing(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tiny_base, tmp_path, dry_run=True, **FULL)
    before = tree(tmp_path)
    result = run(settings)
    assert tree(tmp_path) == before
    assert result.adapter_path is None
    shown = capsys.readouterr().out
    assert f"snella, {result.sizes.trainable:,} trainable parameters in" in shown
    assert "photos: 3 to train on, 1 held out" in shown
    assert "class images: 0 there, 3 to generate" in shown
    assert "GiB" in shown
    assert "nothing was written" in shown


# -- failures -------------------------------------------------------------------------------------


@pytest.fixture
def bad_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the loss of one step NaN."""

    def plant(step: int) -> None:
        build = training.build_loss

        def broken(*arguments: Any) -> Any:
            loss_at = build(*arguments)

            def call(at: int, micro: int) -> Any:
                loss, parts = loss_at(at, micro)
                return (loss * math.nan if at == step else loss), parts

            return call

        monkeypatch.setattr(training, "build_loss", broken)

    return plant


def test_a_bad_loss_stops_and_keeps_the_last_good_state(
    tiny_base: Path, tmp_path: Path, bad_step: Callable[[int], None]
) -> None:
    settings = config(tiny_base, tmp_path)
    bad_step(3)
    with pytest.raises(
        NonFiniteError, match=r"loss is nan at step 3, .*kept in .*step-000002"
    ) as e:
        run(settings)
    assert e.value.exit_code == 3
    folder = tmp_path / "run"
    kept = CheckpointFolder(folder / "checkpoints").latest(pytest.fail)
    assert kept is not None
    assert kept.step == 2
    for group in ("adapter", "optimizer"):
        for name, tensor in kept.tensors[group].items():
            assert torch.isfinite(tensor).all() or name.endswith("threshold.default")
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert not (folder / "pytorch_snella_weights.safetensors").exists()


def test_a_run_that_explodes_leaves_no_nan_file(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, learning_rate=1e30, method="lora")
    with pytest.raises(NonFiniteError, match="learning_rate"):
        run(settings)
    folder = tmp_path / "run"
    assert not list(folder.glob("*.safetensors"))
    for path in folder.glob("checkpoints/*/adapter.safetensors"):
        kept = CheckpointFolder(folder / "checkpoints").load(path.parent)
        assert all(torch.isfinite(t).all() for t in kept.tensors["adapter"].values())


def test_a_failing_picture_does_not_end_the_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("snell_diffusion.diffusion.sampling.Sampler.draw", fail)
    settings = config(tiny_base, tmp_path, validation_prompt=PROMPT, max_train_steps=1)
    result = run(settings)
    assert result.adapter_path is not None
    notes = [e["message"] for e in result.history if e["event"] == "note"]
    assert "sampling at step 1 failed and was skipped: out of memory" in notes
