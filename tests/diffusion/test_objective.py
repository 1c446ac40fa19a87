"""The loss of a batch is the sum of its parts, written out again sample by sample.

The reference below shares with the trainer only which photo, view, prompt and random numbers a
sample gets. Pixels, masks, latents, weights, targets and means are computed anew, one sample at a
time, with a pipeline of its own that never had an adapter.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.framing import View, shapes
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.objective import StepLoss, build_loss, build_probe
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.diffusion.setup import Model, build_model, timestep_settings
from snell_diffusion.diffusion.views import Draws
from snell_diffusion.training.adapter_tensors import trainable_parameters
from snell_diffusion.training.parallel import Parallel, Replicated
from snell_diffusion.training.randomness import generator, normal
from tests.diffusion.training_runs import SIDE

CLASS_PROMPTS = ("a cat", "a dog")
SIZES = [(24, 20), (20, 40), (30, 30)]


@dataclass(frozen=True)
class World:
    """A tiny base with adapters, the same base without, and two concepts on disk."""

    config: TrainConfig
    model: Model
    base: StableDiffusionPipeline
    parallel: Parallel


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def write_world(folder: Path) -> None:
    """Two concepts of three photos each, masks for most, captions for one each, class images."""
    for concept in (0, 1):
        photos = folder / f"photos{concept}"
        (photos / "masks").mkdir(parents=True)
        for number, size in enumerate(SIZES):
            picture(10 * concept + number, size).save(photos / f"{number}.png")
            if number:
                blob = np.zeros(size, np.uint8)
                blob[3 : 3 + 5 * number, 4:15] = 255
                Image.fromarray(blob).save(photos / "masks" / f"{number}.png")
        (photos / "2.txt").write_text(f"caption of {concept}")
        images = folder / f"class{concept}"
        images.mkdir()
        for number in range(2):
            picture(100 + 10 * concept + number, (SIDE, SIDE)).save(images / f"{number}.png")


def make_world(base: Path, folder: Path, **changes: Any) -> World:
    write_world(folder)
    concepts = [
        {
            "instance_data_dir": str(folder / f"photos{number}"),
            "instance_prompt": f"a sks{number}",
            "class_prompt": CLASS_PROMPTS[number],
            "class_data_dir": str(folder / f"class{number}"),
            "repeats": 1 + number,
            "weight": [1.0, 2.5][number],
        }
        for number in (0, 1)
    ]
    config = TrainConfig(
        pretrained_model_name_or_path=str(base),
        concepts=concepts,
        resolution=SIDE,
        rank=4,
        update_scale=100.0,  # so that the adapter's answers differ from the base's
        target_modules=["to_q", "to_v"],
        num_class_images=2,
        **changes,
    )
    model = build_model(config, torch.device("cpu"))
    plain = StableDiffusionPipeline.from_pretrained(base)
    return World(config, model, plain, Replicated(Accelerator(cpu=True)))


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield make_world(tiny_base, tmp_path_factory.mktemp("world"))
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def text_world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    yield make_world(tiny_base, folder, train_text_encoder=True)
    AcceleratorState._reset_state()


# -- the reference --------------------------------------------------------------------------------


def fitted(path: Path, size: tuple[int, int], view: View, grey: bool = False) -> np.ndarray:
    """Scale until the picture covers `size`, cut, mirror; [height, width, ...] bytes."""
    with Image.open(path) as image:
        picture = image.convert("L" if grey else "RGB")
    width, height = picture.size
    scale = max(size[0] / height, size[1] / width)
    larger = max(size[1], round(width * scale)), max(size[0], round(height * scale))
    picture = picture.resize(larger, Image.Resampling.LANCZOS, reducing_gap=3.0)
    left = round((larger[0] - size[1]) * view.crop[0])
    top = round((larger[1] - size[0]) * view.crop[1])
    pixels = np.asarray(picture)[top : top + size[0], left : left + size[1]]
    return pixels[:, ::-1] if view.flip else pixels


class Reference:
    """The loss of one micro-batch in plain steps."""

    def __init__(self, world: World, config: TrainConfig, step: int, micro: int) -> None:
        self.world, self.config, self.at = world, config, (step, micro)
        scheduler = world.base.scheduler
        self.alphas = scheduler.alphas_cumprod.double()

    def embedded(self, pipe: Any, prompt: str) -> Tensor:
        tokens = pipe.tokenizer(
            prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )
        return pipe.text_encoder(tokens.input_ids)[0]

    def sample(self, draws: Draws, place: int) -> dict[str, Any]:
        """Everything about one sample but its error."""
        counters = (*self.at, place)
        photo, view = draws.photos[draws.index(*counters)], draws.view(*counters)
        size, seed, name = draws.shape(*self.at), self.config.seed, draws.name
        pixels = fitted(photo.path, size, view)
        x = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            posterior = self.world.base.vae.encode(x).latent_dist
        scale = self.world.base.vae.config.scaling_factor
        shape = tuple(posterior.mean.shape[1:])
        chance = normal(shape, seed, f"{name}-posterior", *counters)
        latents = (posterior.mean + posterior.std * chance) * scale
        noise = normal(shape, seed, f"{name}-noise", *counters)
        if self.config.noise_offset:
            shift = normal((shape[0], 1, 1), seed, f"{name}-noise-offset", *counters)
            noise = noise + self.config.noise_offset * shift
        weights = np.ones(shape[1:])
        if self.config.masked_loss and photo.mask is not None:
            mask = fitted(photo.mask.path, size, view, grey=True) / 255.0
            blocks = mask.reshape(shape[1], 2, shape[2], 2).mean((1, 3))  # the VAE halves sides
            weights = self.config.unmasked_weight + (1 - self.config.unmasked_weight) * blocks
        u = torch.rand(draws.batch, generator=generator(seed, f"{name}-timestep", *self.at))
        t = int((place + u[place].double()) / draws.batch * 1000)
        a = self.alphas[t]
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise[None]
        snr = float(a / (1 - a))
        gamma = self.config.snr_gamma
        return {
            "photo": photo,
            "prompt": draws.prompt(*counters),
            "noisy": noisy.float(),
            "noise": noise[None],
            "t": torch.tensor([t]),
            "weight": photo.weight * (1.0 if gamma is None else min(snr, gamma) / snr),
            "mask": torch.from_numpy(np.asarray(weights)).float(),
        }

    def answer(self, pipe: Any, sample: dict[str, Any], prompt: str) -> Tensor:
        text = self.embedded(pipe, prompt)
        return pipe.unet(sample["noisy"], sample["t"], encoder_hidden_states=text).sample

    def error(self, answer: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        squares = (answer - target).square()[0]
        return (squares * mask).sum() / (mask.sum() * len(squares))

    def loss(self, instance: list[Photo], images: list[Photo]) -> dict[str, Tensor]:
        config, adapted = self.config, self.world.model.pipe
        known = shapes(config, 8)
        subject, prior = [], []
        size = config.train_batch_size
        draws = Draws(config, "instance", instance, size, 0, 1, known, config.caption_dropout)
        for place in range(size):
            s = self.sample(draws, place)
            error = self.error(self.answer(adapted, s, s["prompt"]), s["noise"], s["mask"])
            subject.append(s["weight"] * error)
            if config.with_prior_preservation and config.prior_loss == "prediction":
                prompt = CLASS_PROMPTS[s["photo"].concept]
                with torch.no_grad():
                    target = self.answer(self.world.base, s, prompt)
                everywhere = torch.ones_like(s["mask"])
                error = self.error(self.answer(adapted, s, prompt), target, everywhere)
                prior.append(s["weight"] * error)
        if config.uses_class_images:
            count = config.class_batch_size or size
            draws = Draws(config, "class", images, count, 0, 1, known)
            for place in range(count):
                s = self.sample(draws, place)
                prompt = CLASS_PROMPTS[s["photo"].concept]
                answer = self.answer(adapted, s, prompt)
                error = self.error(answer, s["noise"], torch.ones_like(s["mask"]))
                prior.append(s["weight"] * error)
        parts = {"loss_instance": torch.stack(subject).mean()}
        total = parts["loss_instance"]
        if prior:
            parts["loss_prior"] = torch.stack(prior).mean()
            total = total + config.prior_loss_weight * parts["loss_prior"]
        return {"loss": total, **parts}


# -- the grid -------------------------------------------------------------------------------------


def built(world: World, config: TrainConfig) -> tuple[StepLoss, Photos]:
    photos = Photos.find(config, RunFolder(config))
    pipe, family = world.model.pipe, world.model.family
    objective = family.objective(pipe, world.model.device, timestep_settings(config))
    model = replace(world.model, objective=objective)
    with ExitStack() as closing:
        arguments = photos.instance, photos.given_class, world.parallel, closing
        return build_loss(config, model, *arguments), photos


def gradient(world: World, loss: Tensor) -> Tensor:
    """All of the adapter's gradients, in a row."""
    parameters = list(trainable_parameters(world.model.components).values())
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])


def require_reference(world: World, config: TrainConfig, step: int, micro: int) -> None:
    """Loss, parts and gradients are those of the reference."""
    loss_at, photos = built(world, config)
    loss, parts = loss_at(step, micro)
    expected = Reference(world, config, step, micro).loss(photos.instance, photos.given_class)
    total = expected.pop("loss")
    assert parts.keys() == expected.keys()
    for name, value in parts.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-6)
    mine, theirs = gradient(world, loss), gradient(world, total)
    assert theirs.norm() > 0
    assert (mine - theirs).norm() <= 1e-3 * theirs.norm()


# What else is on in the cells of the grid, so that all of it meets batch 1 to 3.
MORE: list[dict[str, Any]] = [
    {"snr_gamma": 5.0, "caption_dropout": 0.3, "aspect_ratio_buckets": "16,16;16,24"},
    {"noise_offset": 0.1, "prior_loss_weight": 0.3, "random_flip": True, "unmasked_weight": 0.0},
    {"snr_gamma": 1.0, "caption_templates": ["a photo of {}", "{} outside"], "class_batch_size": 2},
]


@pytest.mark.parametrize("masks", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("captions", [False, True], ids=["prompt", "captions"])
@pytest.mark.parametrize("cached", [False, True], ids=["read", "cached"])
@pytest.mark.parametrize("prior", [None, "images", "prediction"])
def test_the_loss_is_that_of_plain_steps(
    world: World, prior: str | None, cached: bool, captions: bool, masks: bool
) -> None:
    for batch in (1, 2, 3):
        more = dict(MORE[(batch + cached + 2 * masks) % 3])
        if prior != "images":
            more.pop("class_batch_size", None)
        config = replace(
            world.config,
            train_batch_size=batch,
            with_prior_preservation=prior is not None,
            prior_loss=prior or "images",
            cache_latents=cached,
            center_crop=cached,
            use_captions=captions,
            masked_loss=masks,
            **more,
        )
        require_reference(world, config, step=2 + batch, micro=0)


@pytest.mark.parametrize("prior", ["images", "prediction"])
def test_so_it_is_where_the_text_encoder_trains(text_world: World, prior: str) -> None:
    """The base's answers are those of the base's own text encoder."""
    config = replace(
        text_world.config,
        train_batch_size=2,
        with_prior_preservation=True,
        prior_loss=prior,
        gradient_accumulation_steps=2,
        masked_loss=True,
    )
    for micro in (0, 1):
        require_reference(text_world, config, step=1, micro=micro)


def test_the_adapter_is_on_again_after_the_base_was_asked(world: World) -> None:
    config = replace(world.config, with_prior_preservation=True, prior_loss="prediction")
    loss_at, _ = built(world, config)
    trained = trainable_parameters(world.model.components)
    first, _ = loss_at(1, 0)
    assert trainable_parameters(world.model.components).keys() == trained.keys()
    assert all(model.training for model in world.model.components.values())
    assert torch.equal(loss_at(1, 0)[0], first)


def test_a_prior_without_class_prompt_asks_for_nothing(world: World) -> None:
    """The empty prompt, as without classes, is held to the base's answer."""
    concepts = [replace(concept, class_prompt=None) for concept in world.config.concepts]
    changes = {"with_prior_preservation": True, "prior_loss": "prediction"}
    loss_at, photos = built(world, replace(world.config, concepts=concepts, **changes))
    assert {photo.prior_prompt for photo in photos.instance} == {""}
    (part,) = loss_at._batches(1, 0).parts
    assert part.prompts[part.answered :] == [""] * part.answered


def test_batches_of_two_shapes_are_two_parts(world: World) -> None:
    """Class images are square; a batch of wide photos keeps its own shape."""
    config = replace(
        world.config,
        aspect_ratio_buckets="16,16;16,24",
        with_prior_preservation=True,
        train_batch_size=2,
    )
    loss_at, _ = built(world, config)
    seen = set()
    for step in range(1, 10):
        batch = loss_at._batches(step, 0)
        seen.add(tuple(tuple(part.latents.shape) for part in batch.parts))
        assert batch.instances == 2
    assert seen == {((4, 4, 8, 8),), ((2, 4, 8, 12), (2, 4, 8, 8))}


@pytest.mark.parametrize("cached", [False, True], ids=["read", "cached"])
def test_geometry_is_that_of_photo_and_cut(world: World, cached: bool) -> None:
    """What SDXL is told, also of mirrored, cropped and cached photos."""
    config = replace(
        world.config,
        cache_latents=cached,
        center_crop=cached,
        random_flip=True,
        aspect_ratio_buckets="16,16;16,24",
        train_batch_size=3,
    )
    loss_at, photos = built(world, config)
    draws = Draws(config, "instance", photos.instance, 3, 0, 1, shapes(config, 8))
    flips = set()
    for step in range(1, 8):
        (part,) = loss_at._batches(step, 0).parts
        for place, told in enumerate(part.geometry.tolist()):
            photo = draws.photos[draws.index(step, 0, place)]
            view, (height, width) = draws.view(step, 0, place), draws.shape(step, 0)
            with Image.open(photo.path) as image:
                scale = max(height / image.height, width / image.width)
                larger = [
                    max(side, round(whole * scale))
                    for side, whole in zip((width, height), image.size, strict=True)
                ]
                original = [image.height, image.width]
            left, top = (
                round((whole - side) * where)
                for whole, side, where in zip(larger, (width, height), view.crop, strict=True)
            )
            left = larger[0] - width - left if view.flip else left
            assert told == [*original, top, left, height, width]
            flips.add(view.flip)
    assert flips == {False, True}


def test_bad_samples_are_named(world: World) -> None:
    """Those that are held to the base's answer, too."""
    config = replace(world.config, with_prior_preservation=True, prior_loss="prediction")
    loss_at, _ = built(world, replace(config, train_batch_size=1))
    loss_at(1, 0)
    loss_at._errors[1, 0] = torch.tensor([1.0, float("nan")])
    (named,) = loss_at.culprits()
    assert "with prompt 'a " in named
    assert "at timestep" in named


def test_held_out_loss_and_drift_cover_all_shapes_and_concepts(world: World) -> None:
    config = replace(
        world.config,
        aspect_ratio_buckets="16,16;16,24",
        masked_loss=True,
        with_prior_preservation=True,
        prior_loss="prediction",
    )
    photos = Photos.find(config, RunFolder(config))
    probe = build_probe(config, world.model, photos.instance, world.parallel)
    assert probe is not None
    expected = [held_out_errors(world, config, photo, i) for i, photo in enumerate(photos.instance)]
    assert probe.loss() == pytest.approx(float(np.mean(expected)), rel=1e-4)
    chosen = photos.drift_photos([], config, 4)
    assert [photo.concept for photo in chosen] == [0, 1, 0, 1]
    assert {photo.prompt for photo in chosen} == set(CLASS_PROMPTS)
    drift = build_probe(config, world.model, chosen, world.parallel)
    assert drift is not None
    assert 0 < drift.drift() < 1


@torch.no_grad()
def held_out_errors(world: World, config: TrainConfig, photo: Photo, index: int) -> list[float]:
    """The errors of one held-out photo at the fixed timesteps, in plain steps."""
    from snell_diffusion.diffusion.validation import _SEED

    known = shapes(config, 8)
    size = Draws(config, "probe", [photo], 1, 0, 1, known).shape_of(photo)
    x = torch.from_numpy(fitted(photo.path, size, View()) / 127.5 - 1).float().permute(2, 0, 1)
    scale = world.base.vae.config.scaling_factor
    latents = world.base.vae.encode(x[None]).latent_dist.mean * scale
    weights = torch.ones(latents.shape[2:])
    if photo.mask is not None:
        mask = fitted(photo.mask.path, size, View(), grey=True) / 255.0
        blocks = mask.reshape(latents.shape[2], 2, latents.shape[3], 2).mean((1, 3))
        weights = torch.from_numpy(0.1 + 0.9 * blocks).float()
    reference = Reference(world, config, 1, 0)
    errors = []
    for k in range(config.validation_timesteps):
        t = int((k + 0.5) * 1000 / config.validation_timesteps)
        noise = normal(tuple(latents.shape[1:]), _SEED, "held-out", index, k)[None]
        a = reference.alphas[t]
        noisy = (a.sqrt() * latents + (1 - a).sqrt() * noise).float()
        sample = {"noisy": noisy, "t": torch.tensor([t])}
        answer = reference.answer(world.model.pipe, sample, photo.prompt)
        errors.append(float(reference.error(answer, noise, weights)))
    return errors
