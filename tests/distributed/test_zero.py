"""DeepSpeed ZeRO on the CPU: two processes over gloo against one process, by a real launch.

Each stage is launched once, with the committed accelerate config, and trains three runs: SNELLA,
the same again from its checkpoint in the middle, and LoRA with the text encoder.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_text
from snell_diffusion.diffusion.run_folder import ADAPTER_FILES, kind_of
from tests.distributed.ranks import events, largest_difference, ten_steps
from tests.reliability.harness import train_to_the_end

pytestmark = [
    pytest.mark.full,
    pytest.mark.row("D5"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation "
        "'snell-diffusion[deepspeed]'",
    ),
]

MIDDLE = 5


@dataclass(frozen=True)
class Runs:
    """Settings of the same training by method; `again` continues SNELLA's middle."""

    snella: TrainConfig
    again: TrainConfig
    lora: TrainConfig


def runs(base: Path, folder: Path, batch: int) -> Runs:
    # SNELLA's gradient norm is about 2e-3 here: some steps are clipped, some are not.
    common = {"train_batch_size": batch, "num_validation_photos": 1, "max_grad_norm": 2e-3}
    kept = {"checkpointing_steps": MIDDLE, "checkpoints_total_limit": 2}
    snella = ten_steps(base, folder / "snella", **kept, **common)
    middle = Path(snella.output_dir) / "checkpoints" / f"step-{MIDDLE:06d}"
    again = replace(
        snella,
        output_dir=str(folder / "again" / "run"),
        resume_from_checkpoint=str(middle),
    )
    lora = ten_steps(base, folder / "lora", method="lora", train_text_encoder=True, **common)
    return Runs(snella, again, lora)


@pytest.fixture(scope="module")
def one(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What one process trains."""
    settings = runs(tiny_base, tmp_path_factory.mktemp("one"), batch=2)
    train_to_the_end(settings.snella)
    train_to_the_end(settings.lora)
    return settings


def launch(stage: int, settings: Runs, folder: Path, root: Path) -> list[list[dict[str, Any]]]:
    """Train all runs on two processes under a ZeRO stage; the processes' reports by run."""
    files = []
    for number, run in enumerate((settings.snella, settings.again, settings.lora)):
        files.append(folder / f"{number}.yaml")
        files[-1].write_text(config_text(run), "utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate/deepspeed.yaml", "--zero_stage", str(stage)]
    command += ["--main_process_port", "0", "tests/distributed/zero_worker.py", str(stage)]
    done = subprocess.run(
        [*command, str(folder), *map(str, files)],
        cwd=root,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = f"{done.stdout}\n{done.stderr}".splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if "rror" in line)
    return [
        [json.loads((folder / f"{number}.rank{rank}.json").read_text()) for rank in range(2)]
        for number in range(len(files))
    ]


def adapter(settings: TrainConfig) -> dict[str, Tensor]:
    return load_file(Path(settings.output_dir) / ADAPTER_FILES[kind_of(settings.method)])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_train_what_one_does(
    one: Runs, tiny_base: Path, tmp_path: Path, repo_root: Path, row: Any, stage: int
) -> None:
    two = runs(tiny_base, tmp_path, batch=1)
    reports = launch(stage, two, tmp_path, repo_root)

    for first, second in reports:
        require_division(stage, first, second)
        assert (first["saved"], second["saved"]) == (1, 0)
        for part in ("step", "adapter", "optimizer", "allocator"):
            assert first[part] == second[part], f"{part} differs between the processes"

    again, whole = adapter(two.again), adapter(two.snella)
    assert all(again[name].equal(tensor) for name, tensor in whole.items())
    assert reports[1][0]["optimizer"] == reports[0][0]["optimizer"]

    # What two processes under DeepSpeed saved in the middle, one process without it can continue.
    alone = replace(
        one.snella,
        output_dir=str(tmp_path / "alone" / "run"),
        resume_from_checkpoint=two.again.resume_from_checkpoint,
    )
    train_to_the_end(alone)
    assert largest_difference(adapter(one.snella), adapter(alone)) <= 1e-6

    differences = {
        method: largest_difference(
            adapter(getattr(one, method)),
            adapter(getattr(two, method)),
        )
        for method in ("snella", "lora")
    }
    row.figure(
        f"ZeRO-{stage}: largest difference {differences['snella']:.1e} "
        f"(LoRA {differences['lora']:.1e})"
    )
    assert max(differences.values()) <= 1e-6
    assert budgets(two.snella) == budgets(one.snella)


def require_division(stage: int, *reports: dict[str, Any]) -> None:
    """DeepSpeed divides what the stage says, and nothing of the adapter's own values."""
    for report in reports:
        assert report["stage"] == stage
        assert report["divides_gradients"] == (stage >= 2)
        assert report["moments_here"] <= 0.6 * report["trainable"]
        if stage < 3:
            assert report["base_here"] == report["base"]
        else:
            # Only what is smaller than the largest adapter tensor stays whole.
            assert report["base_here"] < 0.1 * report["base"]


def budgets(settings: TrainConfig) -> list[list[tuple[str, int]]]:
    """By allocation, how many entries each layer may keep: a matter of whole matrices."""
    allocations = events(settings, "allocation")
    assert len(allocations) >= 5
    return [[(row["name"], row["budget"]) for row in event["layers"]] for event in allocations]
