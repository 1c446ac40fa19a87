"""New words, convolutions and early stopping on two processes: what one process does."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from snell_diffusion.adapters import read_adapter
from tests.distributed.ranks import (
    adapter,
    largest_difference,
    ten_steps,
    train_to_the_end,
)

EXTRAS: dict[str, Any] = {
    "max_train_steps": 4,
    "instance_prompt": "a <cup> cat",
    "new_tokens": ["<cup>=2"],
    "initializer_token": "cup",
    "target_conv": True,
    "target_modules": ["to_q"],
    "validation_steps": 1,
    "early_stopping_patience": 3,
    "ema_decay": 0.9,
}


@pytest.mark.parametrize("strategy", ["", "FSDP"])
def test_two_processes_train_and_keep_what_one_does(
    strategy: str, tiny_base: Path, tmp_path: Path
) -> None:
    settings = {}
    for processes in (1, 2):
        settings[processes] = ten_steps(
            tiny_base, tmp_path / str(processes), train_batch_size=2 // processes, **EXTRAS
        )
        reports = train_to_the_end(
            processes, settings[processes], strategy=strategy if processes == 2 else ""
        )
        assert len({report["adapter"] for report in reports}) == 1
    one, two = settings[1], settings[2]
    assert read_adapter(Path(two.output_dir) / "pytorch_snella_weights.safetensors").header.tokens
    assert largest_difference(adapter(one), adapter(two)) <= 1e-6
    kept = [
        load_file(Path(s.output_dir) / "checkpoints/step-000004/best.safetensors")
        for s in (one, two)
    ]
    assert largest_difference(*kept) <= 1e-6
