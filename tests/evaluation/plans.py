"""A tiny plan of the protocol, on the tiny base and noisy photos."""

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.diffusion.training_runs import SIDE, write_photos

PLAN: dict[str, Any] = {
    "reference": "lora",
    "subjects": [{"name": "cat", "class_word": "cat", "live": True, "others": ["dog"]}],
    "seeds": [0],
    "common": {
        "resolution": SIDE,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "rank": 2,
        "learning_rate": 0.05,
        "validation_steps": 1,
        "validation_timesteps": 2,
        "target_modules": ["to_q", "to_v"],
    },
    "methods": {"lora": {"method": "lora"}, "ours": {"kernel": "distance"}},
    "images": {"prompts": 2, "per_prompt": 2, "steps": 2, "guidance": 1.0, "sheet": 2},
}
TUNE = {"learning_rates": [0.05, 0.01], "subjects": ["cat"], "seed": 7}


def write_plan(folder: Path, base: Path, **changes: Any) -> Path:
    """Photos of every subject below `folder/photos`, and the plan as `folder/plan.yaml`."""
    values = {"base": str(base), **copy.deepcopy(PLAN), **changes}
    for subject in values["subjects"]:
        write_photos(folder / "photos" / subject["name"])
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))
    return folder / "plan.yaml"


def command(plan: Path, *more: str) -> list[str]:
    """Arguments that run a plan written by `write_plan`."""
    folder = plan.parent
    places = ["--config", str(plan), "--photos", str(folder / "photos")]
    return ["personalization", *places, "--output", str(folder / "out"), *more]
