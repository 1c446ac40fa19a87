"""Real trainings of the app that take a second once they are loaded."""

import hashlib
import sys
import time
from pathlib import Path

from PIL import Image

from snell_diffusion.app.processes import members
from snell_diffusion.diffusion.run_folder import ADAPTER_FILES

PATIENCE = 240  # seconds on a busy machine


def settings(base: Path, photos: Path, **changes) -> dict:
    """Settings of a run of 40 steps over a base of `tiny_models`, its state saved every 10."""
    photos.mkdir(parents=True, exist_ok=True)
    for index in range(3):
        path = photos / f"{index}.png"
        if not path.exists():
            Image.radial_gradient("L").rotate(30 * index).convert("RGB").save(path)
    values = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(photos),
        "instance_prompt": "a photo of a sks cat",
        "validation_prompt": "a photo of a sks cat",
        "num_validation_photos": 1,
        "resolution": 32,
        "rank": 4,
        "train_batch_size": 1,
        "num_inference_steps": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 40,
        "validation_steps": 10,
        "sample_steps": 20,
        "checkpointing_steps": 10,
        "checkpoints_total_limit": 2,
        "seed": 0,
    }
    return {**values, **changes}


def start(jobs, values: dict, label: str = "a cat") -> str:
    job = jobs.new()
    jobs.start(job, values, label, {"subject": "cat", "base": "tiny"})
    return job


def ended(jobs, job: str):
    """The status of a run once no process of it is left."""
    wait_for(lambda: not jobs.alive(job))
    assert members(jobs.folder(job) / "settings.yaml") == []
    return jobs.status(job)


def wait_for(condition, seconds: float = PATIENCE, pause: float = 0.02):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
    return found


def without_launcher(script: Path, config: Path, resume: bool = False) -> list[str]:
    """The training script alone: three seconds less than through `accelerate launch`."""
    more = ["--resume_from_checkpoint", "auto"] if resume else []
    return [sys.executable, str(script), "--config", str(config), *more]


def adapter_digest(run: Path) -> str:
    """SHA-256 of the adapter file of a run folder: every bit of tensors and header."""
    return hashlib.sha256((run / ADAPTER_FILES["ours"]).read_bytes()).hexdigest()
