"""The demos behind `make demo` and `make demo-dit`: photos -> SNELLA training -> one picture.

Writes beside the run folder that the config names: photos/ and holdout/ (see demo_photos.py), and
demo.png. Run it as `python -m scripts.demo CONFIG` from the root of the project.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = "a sks bowl"
PROMPTS = (
    f"a photo of {SUBJECT} on a wooden floor",
    f"a photo of {SUBJECT} in the snow",
    f"a photo of {SUBJECT} on the beach",
    f"a photo of {SUBJECT} on top of green grass",
    f"a photo of {SUBJECT} at night",
)
ENVIRONMENT = {  # of this process and of the training
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the same pictures for any core count; more gain little here
}
COLUMNS = ("photo (a crop)", "base model", "with SNELLA")
STEPS = 50
GUIDANCE = 3.0


def train(config: Path) -> None:
    """Run the training script in a process of its own; its output goes to the terminal."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["train_dreambooth_snella.py", "--config", str(config)]
    print("\n$ " + " ".join(["accelerate", *command[1:]]), flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("the demo stops here: the training failed, its reason stands above")


def draw(config: Any, photos: Sequence[Path], target: Path) -> None:
    """Draw every prompt with the base and with the adapter, from the same seeds.

    Args:
        config: The TrainConfig of the run.
        photos: What the run was trained on.
        target: File of the picture.
    """
    from diffusers.utils.logging import disable_progress_bar
    from PIL import Image

    import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
    from scripts.demo_picture import Row, comparison
    from snell_diffusion.diffusion.setup import load_base

    disable_progress_bar()
    _, pipe = load_base(config)
    pipe.set_progress_bar_config(disable=True)
    base = list(pictures(pipe))
    pipe.load_snella_weights(config.output_dir)
    adapted = list(pictures(pipe))
    references = [Image.open(photos[i % len(photos)]) for i in range(len(PROMPTS))]
    columns = zip(references, base, adapted, strict=True)
    rows = [Row(prompt, shown) for prompt, shown in zip(PROMPTS, columns, strict=True)]
    comparison(COLUMNS, rows).save(target)


def pictures(pipe: Any) -> Iterator[Any]:
    """One picture per prompt; the number of the prompt is its seed."""
    import torch

    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        yield pipe(
            prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator
        ).images[0]


def measured(run: Path) -> tuple[float, float]:
    """Held-out loss of the subject, base model and adapted, from the run's log.

    Raises:
        ValueError: The run measured none.
    """
    from snell_diffusion.training.tracking import read_log

    losses = [event for event in read_log(run / "log.jsonl") if event["event"] == "validation"]
    if not losses:
        raise ValueError(f"{run / 'log.jsonl'} holds no validation: the config must name a holdout")
    return losses[-1]["validation_loss_base"], losses[-1]["validation_loss"]


def peak_memory_gib() -> float:
    """Most memory that this process or any child of it used at a time, in GiB."""
    used = [
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(used) * unit / 2**30


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file below configs/dreambooth")
    path = parser.parse_args().config
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)  # before torch is imported, which reads it once
    from scripts.demo_photos import write_photos
    from snell_diffusion.diffusion.config_files import make_config, read_config

    config = make_config(read_config(path), where=str(path))
    run = Path(config.output_dir)
    picture = run.parent / "demo.png"
    photos, holdout = write_photos(run.parent)
    print(f"photos to train on: {photos}, held out: {holdout}")
    train(path)
    draw(config, sorted(photos.glob("*.png")), picture)
    before, after = measured(run)
    print(f"\nadapter       {next(run.glob('*.safetensors'))}")
    print(f"picture       {picture}")
    print(f"held-out loss {before:.4f} (base model) -> {after:.4f} (with SNELLA)")
    print(f"time          {time.monotonic() - began:.0f} s")
    print(f"peak memory   {peak_memory_gib():.2f} GiB")


if __name__ == "__main__":
    main()
