"""The training script under DeepSpeed, watched; `accelerate launch` starts it, test_zero reads it.

    zero_worker.py STAGE FOLDER SETTINGS...

Runs the script once per settings file, and leaves `FOLDER/<number>.rank<rank>.json` for each.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import train_dreambooth_snella
from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.results import save_result
from snell_diffusion.training.adapter_tensors import adapter_tensors
from snell_diffusion.training.loop import TrainState
from snell_diffusion.training.parallel import Parallel
from tests.distributed.ranks import digest

build_state = training.build_state


def require_topology(parallel: Parallel, stage: int) -> None:
    """What started is what was asked for, before anything trains."""
    assert torch.distributed.get_world_size() == parallel.world == int(os.environ["WORLD_SIZE"])
    assert torch.distributed.get_rank() == parallel.rank == int(os.environ["RANK"])
    assert torch.distributed.get_backend() == "gloo"
    assert parallel.name == f"DeepSpeed ZeRO-{stage}"


def watched_run(stage: int, settings: str) -> dict[str, Any]:
    """Run the script with one settings file; what this process did and holds."""
    report: dict[str, Any] = {"saved": 0}
    watched: dict[str, Any] = {}

    def build(config: TrainConfig, components: Any, parallel: Parallel) -> TrainState:
        require_topology(parallel, stage)
        watched.update(state=build_state(config, components, parallel), parallel=parallel)
        return watched["state"]

    def save(*arguments: Any) -> None:
        report["saved"] += 1
        save_result(*arguments)

    training.build_state, training.save_result = build, save
    code = train_dreambooth_snella.main(["--config", settings])
    if code:
        sys.exit(code)
    return {**report, **held(**watched)}


def held(state: TrainState, parallel: Any) -> dict[str, Any]:
    """How much of everything this process holds after the last step, and digests of the state."""
    engine = parallel._engine
    adapters = adapter_tensors(state.components)
    base = [
        parameter
        for model in state.components.values()
        for parameter in model.parameters()
        if not any(parameter is tensor for tensor in adapters.values())
    ]
    optimizer = state.optimizer.state_dict()["state"]
    slices = [
        value
        for entries in engine.optimizer.optimizer.state.values()
        for key, value in entries.items()
        if key == "exp_avg"
    ]
    competition = {} if state.competition is None else state.competition.state_dict()
    return {
        "stage": engine.zero_optimization_stage(),
        "divides_gradients": engine.zero_optimization_partition_gradients(),
        "step": state.step,
        "base": sum(getattr(p, "ds_numel", p.numel()) for p in base),
        "base_here": sum(p.numel() for p in base),
        "trainable": sum(p.numel() for p in state.parameters),
        "moments_here": sum(part.numel() for part in slices),
        "adapter": digest(adapters),
        "optimizer": digest({f"{i}.{k}": v for i, e in optimizer.items() for k, v in e.items()}),
        "allocator": digest(competition),
        "keep": {k: v for k, v in competition.items() if k.startswith("keep.")},
    }


if __name__ == "__main__":
    stage, folder, *runs = sys.argv[1:]
    # A run leaves the process group at its end; the next one here needs it.
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
    for number, settings in enumerate(runs):
        found = watched_run(int(stage), settings)
        Path(folder, f"{number}.rank{os.environ['RANK']}.json").write_text(json.dumps(found))
