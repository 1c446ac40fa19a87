"""Tiny pipelines and their short training runs, made once per session and family."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.families import Family, families
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.diffusion.training import RunResult, run
from tests.diffusion import training_runs
from tests.families.tiny import Tiny, tiny


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


@pytest.fixture(scope="session", params=sorted(families()))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    record = tiny(request.param)
    folder = tmp_path_factory.mktemp("families") / request.param
    record.save(folder)
    return Case(families()[request.param], record, folder)


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


@pytest.fixture(scope="session")
def trained(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    config = settings(case, tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        model = keep_model(patch)
        result = run(config)
        yield Trained(config, result, model())


def keep_model(patch: pytest.MonkeyPatch) -> Any:
    """Keep what `run` builds; call the result afterwards to get it."""
    kept: list[Model] = []
    build = training.build_model

    def keep(*arguments: Any) -> Model:
        kept.append(build(*arguments))
        return kept[-1]

    patch.setattr(training, "build_model", keep)
    return lambda: kept[-1]
