"""Whole runs on a tiny base: what they write, and other ways to train."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import make_config, read_config
from snell_diffusion.diffusion.training import run
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.tracking import read_log
from tests import tiny_models
from tests.diffusion.training_runs import CLASS_PROMPT, PROMPT, SIDE, config, tree, write_photos

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
