"""A resume with other settings is refused field by field, or allowed by a documented list."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import KEYS
from snell_diffusion.diffusion.run_folder import FREE, PER_PROCESS, identity, require_same
from snell_diffusion.training.checkpoints import Checkpoint
from snell_diffusion.training.errors import CheckpointError
from tests import tiny_models
from tests.diffusion.training_runs import PROMPT, write_photos
from tests.reliability import harness
from tests.reliability.harness import checkpoints, copy_run, resumed, small_run

pytestmark = pytest.mark.row("R8")

STEPS = 3


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run with a checkpoint of every step."""
    settings = small_run(
        tiny_base,
        tmp_path_factory.mktemp("finished"),
        max_train_steps=STEPS,
        checkpoints_total_limit=None,
        train_batch_size=2,
    )
    harness.train_to_the_end(settings)
    return settings


def other_photo(settings: TrainConfig, folder: Path) -> dict[str, Any]:
    photos = shutil.copytree(str(settings.instance_data_dir), folder / "photos")
    with Image.open(photos / "0.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "0.png")
    return {"instance_data_dir": str(photos)}


def other_base(part: str) -> Callable[[TrainConfig, Path], dict[str, Any]]:
    """The same base but for one number in one weight of one part."""

    def change(settings: TrainConfig, folder: Path) -> dict[str, Any]:
        pipe = tiny_models.pipeline()
        with torch.no_grad():
            next(getattr(pipe, part).parameters()).view(-1)[0] += 1e-3
        pipe.save_pretrained(folder / "base")
        return {"pretrained_model_name_or_path": str(folder / "base")}

    return change


DIGESTS = r"'[0-9a-f]{64}' then, '[0-9a-f]{64}' now"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rank": 8}, "rank: 4 then, 8 now"),
        ({"learning_rate": 0.02}, "learning_rate: 0.01 then, 0.02 now"),
        (
            {"target_modules": ["to_q"]},
            r"target_modules: \['to_q', 'to_v'\] then, \['to_q'\] now",
        ),
        (other_photo, f"photos: {DIGESTS}"),
        (other_base("unet"), f"base: {DIGESTS}"),
        (other_base("text_encoder"), f"base: {DIGESTS}"),
        (other_base("vae"), f"base: {DIGESTS}"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"mixed_precision": "bf16"}, "mixed_precision: 'no' then, 'bf16' now"),
        ({"train_batch_size": 3}, "global_batch_size: 2 then, 3 now"),
        (
            {"seed": 1, "rank": 8},
            "rank: 4 then, 8 now; seed: 0 then, 1 now. Continue with the settings in .*config.yaml",
        ),
    ],
)
def test_refused(finished: TrainConfig, tmp_path: Path, change: Any, said: str) -> None:
    folder = copy_run(Path(finished.output_dir), tmp_path / "run")
    values = change(finished, tmp_path) if callable(change) else change
    log = (folder / "log.jsonl").read_bytes()
    settings = resumed(replace(finished, output_dir=str(folder), **values))
    outcome = harness.run_script(settings)
    assert outcome.code == 2
    assert "Traceback" not in outcome.said
    assert re.search(f"belongs to a run with other settings: .*{said}", outcome.said)
    assert (folder / "log.jsonl").read_bytes() == log
    assert checkpoints(folder).steps() == [1, 2, 3]


def test_free_settings_change_nothing_that_is_trained(
    finished: TrainConfig, tmp_path: Path
) -> None:
    """All of them at once: photos and base moved, more workers, pictures, another folder."""
    values: dict[str, Any] = {
        "cache_dir": str(tmp_path / "cache"),
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 5,
        "class_data_dir": str(tmp_path / "class"),
        "dataloader_num_workers": 1,
        "guidance_scale": 2.0,
        "instance_data_dir": str(write_photos(tmp_path / "moved")),
        "num_inference_steps": 1,
        "num_validation_images": 2,
        "offload_encoders": False,
        "output_dir": str(tmp_path / "run"),
        "overwrite": True,
        "pretrained_model_name_or_path": str(
            shutil.copytree(finished.pretrained_model_name_or_path, tmp_path / "base")
        ),
        "resume_from_checkpoint": str(checkpoints(Path(finished.output_dir)).path(1)),
        "revision": "main",
        "sample_batch_size": 1,
        "sample_prompts": ["a cat"],
        "sample_steps": 2,
        "validation_prompt": PROMPT,
        "validation_steps": 1,
        "validation_timesteps": 3,
    }
    elsewhere = {"dry_run", "report_to", "validation_data_dir", "variant"}
    elsewhere |= {"push_to_hub", "hub_model_id", "hub_private_repo"}
    assert values.keys() | elsewhere == FREE, "a new free setting needs a value here"
    folder = harness.train_to_the_end(replace(finished, **values))
    assert harness.logged_steps(folder) == [2, 3]
    # The adapter file names the base's folder, so what was trained is compared.
    ends = [checkpoints(Path(f)).path(STEPS) for f in (finished.output_dir, folder)]
    for name in ("adapter", "optimizer", "competition"):
        files = [end / f"{name}.safetensors" for end in ends]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def state_of(**settings: Any) -> Checkpoint:
    return Checkpoint(
        Path("runs/x/checkpoints/step-000001"), 1, {}, {"class_images": None, **settings}
    )


@pytest.mark.parametrize(
    "then, now, said",
    [
        ((4, 1, {}), (2, 2, {}), None),
        ((1, 4, {}), (4, 1, {}), None),
        ((2, 1, {}), (2, 2, {}), "global_batch_size: 2 then, 4 now"),
        ((4, 1, {"dropout": 0.1}), (2, 2, {"dropout": 0.1}), "processes: 1 then, 2 now"),
        (
            (4, 1, {"class_batch_size": 2}),
            (2, 2, {"class_batch_size": 2}),
            "global_class_batch_size: 2 then, 4 now",
        ),
        ((4, 1, {"class_batch_size": 2}), (2, 2, {"class_batch_size": 1}), None),
        ((4, 1, {}), (2, 2, {"class_batch_size": 2}), None),
    ],
)
def test_process_count(
    finished: TrainConfig, then: tuple[int, int, Any], now: tuple[int, int, Any], said: str | None
) -> None:
    """Another number of processes is fine where the global batch is the same."""
    prior = {"with_prior_preservation": True, "class_prompt": "a cat"}

    def of(batch: int, processes: int, more: dict[str, Any]) -> dict[str, Any]:
        settings = replace(finished, train_batch_size=batch, **prior, **more)
        return identity(settings, "photos", "base", processes)

    checkpoint = state_of(identity=of(*then))
    if said is None:
        require_same(checkpoint, of(*now))
        return
    with pytest.raises(CheckpointError, match=said):
        require_same(checkpoint, of(*now))


def test_every_setting_is_compared_or_free() -> None:
    compared = set(KEYS) - FREE - PER_PROCESS
    found = identity(TrainConfig(instance_data_dir="x", instance_prompt="x"), "", "", 1)
    assert compared <= found.keys()
    assert set(KEYS) >= FREE | PER_PROCESS


def test_the_documented_list_is_the_list(repo_root: Path) -> None:
    page = (repo_root / "docs" / "checkpoints.md").read_text("utf-8")
    table = page.split("## Settings that may change\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(FREE)
