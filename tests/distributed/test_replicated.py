"""Two processes train what one trains: the same samples, noise and timesteps, half of them each.

Everything is the product's own: SNELLA with competing layers, AdamW with epsilon 1e-15, learning
rate 1e-3, float32.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from snell_diffusion.diffusion.run_folder import ADAPTER_FILES
from tests.distributed.ranks import (
    adapter,
    events,
    largest_difference,
    ten_steps,
    train_to_the_end,
)
from tests.reliability.harness import ADAPTER

pytestmark = pytest.mark.row("D1")

CASES: dict[str, dict[str, Any]] = {
    "even": {"num_validation_photos": 0},  # 4 photos, global batches of 2
    "uneven": {"num_validation_photos": 1},  # 3 photos
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(
    tiny_base: Path, tmp_path: Path, row: Any, case: str
) -> None:
    one = ten_steps(tiny_base, tmp_path / "one", train_batch_size=2, **CASES[case])
    train_to_the_end(1, one)
    repeats = []
    for name in ("two", "again"):
        two = ten_steps(tiny_base, tmp_path / name, train_batch_size=1, **CASES[case])
        first, second = train_to_the_end(2, two)
        assert first["step"] == 10
        for part in ("adapter", "optimizer", "allocator"):
            assert first[part] == second[part], f"{part} differs between the processes"
        repeats.append((Path(two.output_dir) / ADAPTER).read_bytes())
    assert repeats[0] == repeats[1]
    difference = largest_difference(adapter(one), adapter(two))
    row.figure(f"largest difference {difference:.1e}")
    assert difference <= 1e-6
    for mine, theirs in zip(events(one, "step"), events(two, "step"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["kept_share"] == theirs["kept_share"]


def test_lora_is_trained_so_too(tiny_base: Path, tmp_path: Path) -> None:
    runs = {}
    for processes in (1, 2):
        runs[processes] = ten_steps(
            tiny_base, tmp_path / str(processes), train_batch_size=2 // processes, method="lora"
        )
        train_to_the_end(processes, runs[processes])
    one, two = (Path(s.output_dir) / ADAPTER_FILES["lora"] for s in runs.values())
    assert largest_difference(load_file(one), load_file(two)) <= 1e-6
