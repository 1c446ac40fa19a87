"""What holds for every family: it asks the denoiser as its stock pipeline does, and it trains.

A new family is tested here from the day its file appears; it needs a `tiny_<name>.py`.
"""

import math
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipelines
from snell_diffusion.diffusion.families import SampleRequest
from snell_diffusion.diffusion.setup import load_base
from snell_diffusion.diffusion.timesteps import TimestepSettings
from snell_diffusion.training.adapter_tensors import (
    adapters_off,
    evaluating,
    trainable_parameters,
)
from tests.families.conftest import (
    CPU,
    Adapted,
    Case,
    Trained,
    conditions,
    noisy_example,
    settings,
    train,
)
from tests.families.stock import PROMPTS, call, generators, stock_steps

PLAIN = TimestepSettings()
ADAPTER = "pytorch_snella_weights.safetensors"


# -- as the stock pipeline ------------------------------------------------------------------------


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_stock_pipeline(case: Case, pipe: Any) -> None:
    stock = case.tiny.stock_text(case.stock(), PROMPTS)
    ours = case.family.encode_text(pipe, PROMPTS)
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, n=name: f"{n}: {text}")


@torch.no_grad()
def test_rows_of_prompts_do_not_depend_on_each_other(case: Case, pipe: Any) -> None:
    """Cached rows of single prompts are stacked into batches."""
    together = case.family.encode_text(pipe, [*PROMPTS, ""])
    for row, prompt in enumerate([*PROMPTS, ""]):
        alone = case.family.encode_text(pipe, [prompt])
        for name, rows in together.items():
            torch.testing.assert_close(alone[name][0], rows[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_denoise_is_a_step_of_the_stock_pipeline(case: Case, pipe: Any) -> None:
    """Same sign, scale, timestep, packing and conditions as what the stock scheduler is given.

    For tall pictures, so that rows taken for columns would show.
    """
    stock, height = case.stock(), 2 * case.tiny.side
    seen = stock_steps(case, stock, 2, height=height)
    asked = conditions(case, pipe, PROMPTS, height)
    for output, t, sample in seen:
        noisy, expected = (case.tiny.unpack(stock, x, height) for x in (sample, output))
        timesteps = torch.as_tensor(t).expand(len(noisy))
        ours = case.family.denoise(getattr(pipe, case.family.denoiser), noisy, timesteps, asked)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


def test_targets_lead_the_stock_scheduler_to_the_data(case: Case, pipe: Any) -> None:
    """Given our targets as predictions, the stock scheduler walks along our noisy latents."""
    stock = case.stock()
    objective = case.family.objective(stock, CPU, PLAIN)
    step, state = stock.scheduler.step, {}

    def walk(output: Tensor, t: Tensor, sample: Tensor, *more: Any, **named: Any) -> Any:
        if not state:
            draw = torch.Generator().manual_seed(1)
            state["data"], state["noise"] = torch.randn(2, *sample.shape, generator=draw)
        data, noise = state["data"], state["noise"]
        timesteps = torch.as_tensor(t).expand(len(sample))
        noisy = objective.add_noise(data, noise, timesteps)
        if "next" in state:
            torch.testing.assert_close(sample, noisy, rtol=0, atol=case.tiny.atol)
        result = step(objective.target(data, noise, timesteps), t, noisy, *more, **named)
        state["next"] = result[0]
        return result

    stock.scheduler.step = walk
    call(case, stock, steps=4, **case.tiny.plain)
    torch.testing.assert_close(state["next"], state["data"], rtol=0, atol=case.tiny.atol)


def request(case: Case, pipe: Any) -> SampleRequest:
    """Pictures of PROMPTS at guidance 3."""
    encoded = case.family.encode_text(pipe, [*PROMPTS, ""])
    return SampleRequest(
        conditions={name: rows[:-1] for name, rows in encoded.items()},
        unconditional={name: rows[-1:] for name, rows in encoded.items()},
        generators=generators(),
        size=case.tiny.side,
        steps=2,
        guidance=3.0,
    )


@torch.no_grad()
def test_samples_are_those_of_the_stock_pipeline(case: Case, pipe: Any) -> None:
    ours = case.family.decode_latents(pipe, case.family.sample(pipe, request(case, pipe)))
    stock = call(case, case.stock(), steps=2, output_type="pt", **case.tiny.guided).images
    torch.testing.assert_close(ours, stock.float(), rtol=0, atol=1e-3)


@torch.no_grad()
def test_latents_decode_to_the_picture(case: Case, pipe: Any) -> None:
    """Encoding scales as decoding unscales: both ways give what the VAE alone gives."""
    pixels = torch.rand(1, 3, case.tiny.side, case.tiny.side) * 2 - 1
    mean, std = case.family.encode_images(pipe, pixels)
    assert mean.shape == std.shape
    assert mean.dtype == torch.float32
    encoded = pipe.vae.encode(pixels.unsqueeze(2) if case.tiny.film else pixels)
    raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    decoded = pipe.vae.decode(raw).sample
    expected = ((decoded.squeeze(2) if case.tiny.film else decoded) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(case.family.decode_latents(pipe, mean), expected)


def test_the_record_fits_the_pipeline(case: Case, pipe: Any) -> None:
    family = case.family
    assert type(pipe).__name__ in family.pipelines
    assert len(family.text_encoders) == len(family.tokenizers)
    known = set(pipe.components)
    assert {family.denoiser, *family.text_encoders, *family.tokenizers} <= known
    assert case.tiny.side % family.multiple == 0
    assert family.native_size(pipe) >= case.tiny.side


def test_nothing_leaves_the_denoisers_device(case: Case, pipe: Any) -> None:
    """With all inputs on another device, so is every tensor that `denoise` makes itself."""
    if case.tiny.reads_values:
        pytest.skip("its denoiser reads the values of masks, which meta tensors do not have")
    latents, _, timesteps = noisy_example(case, pipe, case.family.objective(pipe, CPU, PLAIN))
    with torch.no_grad():
        asked = conditions(case, pipe, PROMPTS)
    away = {name: rows.to("meta") for name, rows in asked.items()}
    denoiser = deepcopy(getattr(pipe, case.family.denoiser)).to("meta")
    answer = case.family.denoise(denoiser, latents.to("meta"), timesteps.to("meta"), away)
    assert answer.shape == latents.shape
    assert answer.device.type == "meta"


@torch.no_grad()
def test_16_bits(base: Case, tmp_path: Path) -> None:
    """Large encoders follow the denoiser, the VAE does not; answers stay close, samples finite."""
    config = settings(base, tmp_path, mixed_precision="bf16")
    family, half = load_base(config)
    for name, part in half.components.items():
        if isinstance(part, torch.nn.Module):
            small = name in (family.denoiser, *family.large_encoders)
            assert part.dtype == (torch.bfloat16 if small else torch.float32), name
    full = family.load(str(base.folder))
    latents, _, timesteps = noisy_example(base, full, family.objective(full, CPU, PLAIN))
    exact, close = (
        family.denoise(
            getattr(p, family.denoiser), latents, timesteps, conditions(base, p, PROMPTS)
        )
        for p in (full, half)
    )
    assert (close.float() - exact).norm() < 0.05 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        latents = family.sample(half, request(base, half))
    assert torch.isfinite(family.decode_latents(half, latents)).all()


# -- it trains ------------------------------------------------------------------------------------


def test_two_steps_have_a_finite_loss_and_both_parts(trained: Trained) -> None:
    steps = [e for e in trained.result.history if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 2]
    for event in steps:
        assert math.isfinite(event["loss"])
        total = event["loss_instance"] + event["loss_prior"]
        assert event["loss"] == pytest.approx(total, rel=1e-5)
    assert trained.result.validation_loss_after != trained.result.validation_loss_before
    assert (trained.result.output_dir / "class_images").is_dir()


def test_the_prior_may_be_the_answers_of_the_base(base: Case, tmp_path: Path) -> None:
    """Without class images; an adapter that changes nothing yet has no such loss."""
    result = train(
        settings(
            base,
            tmp_path,
            prior_loss="prediction",
            train_text_encoder=False,
            num_validation_photos=0,
            checkpointing_steps=None,
        )
    )
    first, second = (e["loss_prior"] for e in result.history if e["event"] == "step")
    assert first == pytest.approx(0, abs=1e-10)
    assert 1e-6 < second < math.inf
    assert not (result.output_dir / "class_images").exists()


def test_gradients_reach_every_adapter(base: Case, adapted: Adapted) -> None:
    parameters = trainable_parameters(adapted.components)
    names = list(parameters)
    loss = adapted.loss(conditions(base, adapted.pipe, PROMPTS))
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    missed = {n for n, g in zip(names, grads, strict=True) if g is None or not g.any()}
    assert missed == {n for n in names if any(part in n for part in base.tiny.idle)}
    assert {name.split(".")[0] for name in names} == set(adapted.components)


def test_a_batch_can_be_learned_by_heart(base: Case, adapted: Adapted) -> None:
    with torch.no_grad():
        asked = conditions(base, adapted.pipe, PROMPTS)
    parameters = trainable_parameters(adapted.components).values()
    optimizer = torch.optim.AdamW(parameters, lr=3e-2, eps=1e-15)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = adapted.loss(asked)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_resumed_is_bit_identical(trained: Trained, tmp_path: Path) -> None:
    whole = trained.result.output_dir
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    (tmp_path / "run" / ADAPTER).unlink()
    train(
        replace(trained.config, output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    )
    for name in (ADAPTER, "checkpoints/step-000002/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@torch.no_grad()
def test_the_file_in_a_stock_pipeline_is_the_trained_model(base: Case, trained: Trained) -> None:
    model = trained.model
    latents, _, timesteps = noisy_example(base, model.pipe, model.objective)

    def answer(pipe: Any, denoiser: Any) -> Tensor:
        asked = conditions(base, pipe, PROMPTS)
        return base.family.denoise(denoiser, latents, timesteps, asked)

    with evaluating(model.components):
        expected = answer(model.pipe, model.denoiser)
        with adapters_off(model.components):
            assert not torch.allclose(answer(model.pipe, model.denoiser), expected)
    stock = base.stock()
    stock.load_snella_weights(trained.result.adapter_path)
    torch.testing.assert_close(answer(stock, getattr(stock, base.family.denoiser)), expected)
    pictures = call(base, stock, steps=1, output_type="pt", **base.tiny.guided).images
    assert torch.isfinite(pictures).all()
