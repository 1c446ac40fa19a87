"""Whole runs on a tiny base: what they write, that they resume exactly, that nothing is lost."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import make_config, read_config
from snell_diffusion.diffusion.prior import ClassImages, complete_images
from snell_diffusion.diffusion.training import RunResult, run
from snell_diffusion.errors import SnellaBaseError, SnellaConfigError
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    OutputError,
)
from snell_diffusion.training.tracking import read_log
from tests import tiny_models
from tests.diffusion.training_runs import CLASS_PROMPT, PROMPT, SIDE, config, write_photos

FULL: dict[str, Any] = {
    "class_prompt": CLASS_PROMPT,
    "with_prior_preservation": True,
    "num_class_images": 3,
    "class_batch_size": 1,
    "train_text_encoder": True,
    "ema_decay": 0.9,
    "snr_gamma": 5.0,
    "gradient_accumulation_steps": 2,
    "random_flip": True,
    "validation_steps": 2,
    "sample_steps": 2,
    "validation_prompt": PROMPT,
    "sample_prompts": ["a cat on grass"],
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 3,
    "dropout": 0.1,
    "init": "identity",  # so that the run starts at the base's own loss
    "sparsify": "mask",
}


@pytest.fixture(scope="module")
def full(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, RunResult, list[dict[str, Any]]]:
    """One run with everything on."""
    settings = config(tiny_base, tmp_path_factory.mktemp("full"), **FULL)
    events: list[dict[str, Any]] = []
    return settings, run(settings, events.append), events


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def adapter(folder: Path) -> bytes:
    return (folder / "pytorch_snella_weights.safetensors").read_bytes()


# -- what a run leaves ----------------------------------------------------------------------------


def test_run_folder_is_complete(full: Any) -> None:
    settings, result, _ = full
    names = set(tree(result.output_dir))
    assert {
        "config.yaml",
        "log.jsonl",
        "status.json",
        "loss.png",
        "allocation.png",
        "samples.png",
        "README.md",
        "pytorch_snella_weights.safetensors",
        *(f"samples/step-00000{step}.png" for step in (0, 2, 4)),
        *(f"checkpoints/step-00000{step}/manifest.json" for step in (2, 4)),
    } <= names
    assert make_config(read_config(result.output_dir / "config.yaml")) == settings
    status = json.loads((result.output_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["total"]) == ("finished", 4, 4)
    assert not [name for name in names if "tmp" in name]


def test_log_tells_every_step_and_event(full: Any) -> None:
    _, result, events = full
    assert read_log(result.output_dir / "log.jsonl") == events == result.history
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 2, 3, 4]
    assert {
        "loss",
        "loss_instance",
        "loss_prior",
        "lr",
        "grad_norm",
        "kept_share",
        "memory",
    } <= set(steps[0])
    for entry in steps:
        expected = entry["loss_instance"] + entry["loss_prior"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    held_out = [e for e in events if e["event"] == "validation"]
    assert [e["step"] for e in held_out] == [0, 2, 4]
    assert held_out[0]["validation_loss"] == pytest.approx(held_out[0]["validation_loss_base"])
    assert held_out[0]["drift"] == pytest.approx(0, abs=1e-8)
    assert held_out[-1]["drift"] > 0
    assert result.validation_loss_after == held_out[-1]["validation_loss"]
    assert result.validation_loss_before == held_out[0]["validation_loss_base"]


def test_levels_are_logged_and_add_up(full: Any) -> None:
    _, result, events = full
    records = [e["layers"] for e in events if e["event"] == "allocation"]
    assert len(records[-1]) == result.sizes.layers
    kept = [sum(row["budget"] for row in layers) for layers in records]
    assert kept[0] > kept[-1]
    assert {row["name"].split(".")[0] for row in records[-1]} == {"unet", "text_encoder"}


def test_class_images_are_generated_once_and_noted(full: Any) -> None:
    settings, result, _ = full
    folder = result.output_dir / "class_images"
    note = json.loads((folder / "generated.json").read_text())
    assert note == {"prompt": CLASS_PROMPT, "base": settings.pretrained_model_name_or_path}
    images = sorted(folder.glob("class-*.png"))
    assert len(images) == 3
    assert len({image.read_bytes() for image in images}) == 3
    with Image.open(images[0]) as image:
        assert image.size == (SIDE, SIDE)


def test_the_file_works_in_a_stock_pipeline(full: Any, tiny_base: Path) -> None:
    """The saved (averaged) adapter has the held-out loss that the run reports."""
    settings, result, _ = full
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.set_progress_bar_config(disable=True)
    before = tiny_models.picture(pipe)
    pipe.load_snella_weights(result.adapter_path)
    assert not torch.equal(tiny_models.picture(pipe), before)
    assert held_out_loss(pipe, settings) == pytest.approx(result.validation_loss_after, rel=1e-5)


@torch.no_grad()
def held_out_loss(pipe: StableDiffusionPipeline, settings: TrainConfig) -> float:
    """The held-out loss written out again with diffusers' own parts."""
    from diffusers import DDPMScheduler

    from snell_diffusion.diffusion.decoding import open_photo
    from snell_diffusion.diffusion.framing import View, fit, to_unit
    from snell_diffusion.diffusion.validation import _SEED, fixed_timesteps
    from snell_diffusion.training.randomness import normal

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    photo = sorted(Path(str(settings.instance_data_dir)).glob("*.png"))[-1]
    pixels = to_unit(fit(open_photo(photo), (SIDE, SIDE), View()))[None]
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    text = pipe.encode_prompt(settings.instance_prompt, "cpu", 1, False)[0]
    losses = []
    for k, timestep in enumerate(fixed_timesteps(settings.validation_timesteps, 1000)):
        noise = normal(tuple(latents.shape[1:]), _SEED, "held-out", 0, k)[None]
        t = torch.tensor([timestep])
        noisy = scheduler.add_noise(latents, noise, t)
        predicted = pipe.unet(noisy, t, encoder_hidden_states=text).sample
        losses.append(float((predicted - noise).square().mean()))
    return sum(losses) / len(losses)


def test_card_shows_use_numbers_and_pictures(full: Any) -> None:
    _, result, _ = full
    card = (result.output_dir / "README.md").read_text()
    assert f"instance_prompt: {PROMPT}\n" in card
    assert "pipe.load_snella_weights(" in card
    assert f"{result.sizes.trainable:,} in {result.sizes.layers} layers" in card
    assert f"{result.validation_loss_before:.4f} -> {result.validation_loss_after:.4f}" in card
    for name in ("samples.png", "allocation.png", "loss.png"):
        assert f"]({name})" in card


def test_sheets_show_step_zero_first(full: Any) -> None:
    _, result, _ = full
    sheets = []
    for step in (0, 4):
        with Image.open(result.output_dir / "samples" / f"step-00000{step}.png") as image:
            sheets.append(np.asarray(image.convert("RGB"), int))
    assert sheets[0].shape == sheets[1].shape
    assert np.abs(sheets[0] - sheets[1]).max() > 0


# -- exactness ------------------------------------------------------------------------------------


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


# -- other ways to train --------------------------------------------------------------------------


def test_lora_is_the_yardstick_and_loads_as_usual(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, method="lora", train_text_encoder=True)
    result = run(settings)
    assert result.adapter_path is not None
    assert result.adapter_path.name == "pytorch_lora_weights.safetensors"
    assert not (tmp_path / "run" / "allocation.png").exists()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.load_lora_weights(result.adapter_path)
    assert held_out_loss(pipe, settings) == pytest.approx(result.validation_loss_after, rel=1e-5)


def test_v_prediction_base(tiny_base: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    pipe = tiny_models.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pipe.save_pretrained(tmp_path / "base")
    result = run(config(tmp_path / "base", tmp_path, snr_gamma=5.0))
    epsilon = run(config(tiny_base, tmp_path / "epsilon", snr_gamma=5.0))
    assert result.validation_loss_before != pytest.approx(epsilon.validation_loss_before, rel=1e-3)
    assert result.validation_loss_after is not None


def test_training_learns(tiny_base: Path, tmp_path: Path) -> None:
    """The loss on the photos that are trained on falls at fixed timesteps and noise."""
    settings = config(
        tiny_base,
        tmp_path,
        max_train_steps=25,
        num_validation_photos=0,
        validation_data_dir=str(write_photos(tmp_path / "photos")),
        validation_timesteps=4,
        learning_rate=3e-2,
        target_modules=[],
        init="identity",
        sparsify="mask",
    )
    result = run(settings)
    assert result.validation_loss_after < 0.98 * result.validation_loss_before


def test_bfloat16_base_keeps_float32_adapters(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(
        tiny_base,
        tmp_path,
        mixed_precision="bf16",
        max_train_steps=2,
        validation_prompt=PROMPT,
    )
    result = run(settings)
    kept = CheckpointFolder(tmp_path / "run" / "checkpoints").latest(pytest.fail)
    assert kept is not None
    dtypes = {t.dtype for t in kept.tensors["adapter"].values()}
    assert dtypes <= {torch.float32, torch.float64}
    assert (tmp_path / "run" / "samples" / "step-000002.png").exists()
    exact = run(config(tiny_base, tmp_path / "exact", max_train_steps=2))
    assert result.validation_loss_after == pytest.approx(exact.validation_loss_after, rel=0.02)
    # a run in another precision may follow in the same process
    assert exact.adapter_path is not None
