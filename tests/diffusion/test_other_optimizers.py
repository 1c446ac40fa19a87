"""Whole runs with optimizers of other packages: the log tells, and a resumed run is the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.training import run
from tests.diffusion.training_runs import config

CASES = {
    "bitsandbytes.optim.AdamW8bit": {"rank": 16, "target_modules": ["to_q", "ff.net.2"]},
    "prodigyopt.Prodigy": {
        "learning_rate": 1.0,
        "optimizer_args": ["safeguard_warmup=True", "d0=1e-3"],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_same(name: str, tiny_base: Path, tmp_path: Path) -> None:
    package = name.partition(".")[0]
    pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    options: dict[str, Any] = {
        "optimizer": name,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
        "init_sparsity": 0.0,
        "target_sparsity": 0.5,
        "alloc_init_warmup": 0,
        "alloc_final_warmup": 1,
        "alloc_interval": 1,
        **CASES[name],
    }
    settings = config(tiny_base, tmp_path, **options)
    whole = run(settings)
    again = run(
        replace(
            settings,
            output_dir=str(tmp_path / "again"),
            resume_from_checkpoint=str(whole.output_dir / "checkpoints" / "step-000002"),
        )
    )
    assert whole.adapter_path is not None
    assert again.adapter_path is not None
    assert again.adapter_path.read_bytes() == whole.adapter_path.read_bytes()
    steps = [e for e in whole.history if e["event"] == "step"]
    assert all(("d" in entry) == ("Prodigy" in name) for entry in steps)
    if "Prodigy" in name:
        assert [entry["d"] >= 1e-3 for entry in steps] == [True] * 4
