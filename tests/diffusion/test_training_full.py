"""Slow tier: the embedded base on real photos, and two processes against one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from safetensors.torch import load_file

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.training import run
from tests.diffusion.training_runs import config

pytestmark = pytest.mark.full


@pytest.mark.parametrize("method", ["snella", "lora"])
def test_a_real_subject_is_learnt_on_the_embedded_base(
    dreambooth: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    settings = TrainConfig(
        pretrained_model_name_or_path="embedded",
        instance_data_dir=str(dreambooth("dog6")),
        instance_prompt="a photo of a sks dog",
        num_validation_photos=1,
        resolution=64,
        max_train_steps=60,
        learning_rate=1e-3,
        method=method,
        rank=8,
        output_dir=str(tmp_path / "run"),
    )
    result = run(settings)
    assert result.validation_loss_after < 0.97 * result.validation_loss_before


def _worker(base: str, folder: str, options: dict[str, Any]) -> None:
    import accelerate

    # The fork inherits the state of runs before it: one process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    state = accelerate.PartialState(cpu=True)
    assert state.num_processes == 2
    assert state.distributed_type == accelerate.DistributedType.MULTI_CPU
    run(config(Path(base), Path(folder), **options))


def test_two_processes_train_what_one_does(tiny_base: Path, tmp_path: Path) -> None:
    """Half the batch on each of two gloo processes, the same samples, noise and timesteps.

    Plain gradient descent: Adam would magnify rounding wherever a gradient is almost zero.
    """
    options: dict[str, Any] = {"method": "lora", "max_train_steps": 6, "optimizer": "SGD"}
    run(config(tiny_base, tmp_path / "one", train_batch_size=2, **options))
    two = (str(tiny_base), str(tmp_path / "two"), {**options, "train_batch_size": 1})
    debug_launcher(_worker, args=two, num_processes=2)
    files = [tmp_path / n / "run" / "pytorch_lora_weights.safetensors" for n in ("one", "two")]
    one, both = (load_file(file) for file in files)
    assert one.keys() == both.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, both[name], rtol=0, atol=1e-6)
    lines = (tmp_path / "two" / "run" / "log.jsonl").read_text().splitlines()
    steps = [e for e in map(json.loads, lines) if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 7))
    assert all(math.isfinite(e["loss"]) for e in steps)
