"""Tiny pipelines and their short training runs, made once per session and family."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.families import Conditions, Family, families
from snell_diffusion.diffusion.feedback import RunFeedback
from snell_diffusion.diffusion.losses import Objective, squared_error
from snell_diffusion.diffusion.setup import Model, add_adapters, load_base
from snell_diffusion.diffusion.timesteps import TimestepSettings
from snell_diffusion.diffusion.training import RunResult, run
from tests.diffusion import training_runs
from tests.families.tiny import Tiny, records

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One family and its tiny pipeline on disk."""

    family: Family
    tiny: Tiny
    folder: Path

    def stock(self) -> Any:
        """A fresh stock pipeline."""
        pipe = DiffusionPipeline.from_pretrained(self.folder, **self.tiny.options)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@dataclass(frozen=True)
class Trained:
    """A finished run of two steps with everything on, and the model it trained."""

    config: TrainConfig
    result: RunResult
    model: Model


CASES = {name: (f, made) for f in sorted(families()) for name, made in records(f).items()}


def make_case(name: str, folder: Path) -> Case:
    """Write the tiny pipeline of a family or variant to `folder`."""
    family, record = CASES[name]
    record.save(folder)
    return Case(families()[family], record, folder)


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every family, and its variants."""
    return make_case(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="session", params=sorted(families()))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every family once, to train."""
    return make_case(request.param, tmp_path_factory.mktemp("bases") / request.param)


@pytest.fixture(scope="session")
def pipe(case: Case) -> Any:
    """The pipeline as the family loads it; tests leave it as it is."""
    loaded = case.family.load(str(case.folder))
    for part in loaded.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return loaded


def settings(case: Case, folder: Path, **changes: Any) -> TrainConfig:
    """A run of two steps on the tiny pipeline: every layer, class images, held-out photo."""
    values: dict[str, Any] = {
        "resolution": case.tiny.side,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": None,
        "target_modules": [],
        "with_prior_preservation": True,
        "class_prompt": training_runs.CLASS_PROMPT,
        "num_class_images": 1,
        "train_text_encoder": case.tiny.trains_text,
        "validation_timesteps": 1,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "init": "identity",  # so that the run starts at the base's own loss
        "sparsify": "mask",
    }
    return training_runs.config(case.folder, folder, **{**values, **changes})


def conditions(case: Case, pipe: Any, prompts: list[str], height: int | None = None) -> Conditions:
    """What the denoiser is given for whole pictures with these prompts, square or of `height`."""
    width = case.tiny.side
    size = height or width, width
    geometry = torch.tensor([*size, 0, 0, *size]).float().expand(len(prompts), -1)
    return {**case.family.encode_text(pipe, prompts), "geometry": geometry}


def noisy_example(case: Case, pipe: Any, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Two noisy random pictures, what the denoiser should answer, and timesteps."""
    draw, side = torch.Generator().manual_seed(5), case.tiny.side
    pixels = torch.rand(2, 3, side, side, generator=draw) * 2 - 1
    with torch.no_grad():
        latents = case.family.encode_images(pipe, pixels)[0]
    noise = torch.randn(latents.shape, generator=draw)
    timesteps = objective.timesteps(torch.tensor([0.2, 0.7]), side**2)
    noisy = objective.add_noise(latents, noise, timesteps)
    return noisy, objective.target(latents, noise, timesteps), timesteps


@dataclass(frozen=True)
class Adapted:
    """A base with fresh dense adapters, and the loss of one fixed batch."""

    pipe: Any
    components: dict[str, nn.Module]
    loss: Callable[[Conditions], Tensor]


@pytest.fixture(scope="session")
def adapted(base: Case, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    config = settings(base, tmp_path_factory.mktemp("adapted"), init_sparsity=0, target_sparsity=0)
    family, pipe = load_base(config)
    components = add_adapters(replace(config, init="paper"), family, pipe)
    objective = family.objective(pipe, CPU, TimestepSettings())
    noisy, target, timesteps = noisy_example(base, pipe, objective)

    def loss(asked: Conditions) -> Tensor:
        denoiser = components[family.denoiser]
        return squared_error(family.denoise(denoiser, noisy, timesteps, asked), target).mean()

    return Adapted(pipe, components, loss)


@pytest.fixture(scope="session")
def trained(base: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    config = settings(base, tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        model = keep_model(patch)
        result = train(config)
        yield Trained(config, result, model())


def train(config: TrainConfig) -> RunResult:
    """`run` without its plots: they take half of a tiny run and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFeedback, "draw_pictures", lambda feedback: [])
        return run(config)


def keep_model(patch: pytest.MonkeyPatch) -> Any:
    """Keep what `run` builds; call the result afterwards to get it."""
    kept: list[Model] = []
    build = training.build_model

    def keep(*arguments: Any) -> Model:
        kept.append(build(*arguments))
        return kept[-1]

    patch.setattr(training, "build_model", keep)
    return lambda: kept[-1]
