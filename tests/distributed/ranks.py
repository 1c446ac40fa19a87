"""Runs of the trainer on several processes: forks of this one, joined by gloo over loopback.

Each process is a fresh trainer (see `tests.reliability.harness`) that reports what it ended with.
What started is asserted in each of them, before anything trains.
"""

import hashlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_text
from snell_diffusion.training.adapter_tensors import adapter_tensors
from snell_diffusion.training.parallel import Parallel
from tests.diffusion.training_runs import config
from tests.reliability.harness import ADAPTER, Work, log_of, script, start, wait

Install = Callable[[int], None]
"""Called in each process with its rank, before the run: puts in what shall go wrong."""


@dataclass(frozen=True)
class Ended:
    """How one process ended.

    Attributes:
        code: Exit code, or minus the signal that killed it.
        said: All it printed.
        report: What it reported of its state; empty if it did not get that far.
    """

    code: int
    said: str
    report: dict[str, Any]


def nothing(rank: int) -> None:
    """Install nothing: an undisturbed run."""


def ten_steps(base: Path, folder: Path, **changes: Any) -> TrainConfig:
    """A run of 10 steps with the product's own optimizer, epsilon and learning rate."""
    return config(base, folder, **{"max_train_steps": 10, "learning_rate": 1e-3, **changes})


def train_on(
    processes: int, settings: TrainConfig, install: Install = nothing, strategy: str = ""
) -> list[Ended]:
    """Run the training script on some processes to the end; `strategy` is FSDP or empty."""
    with joined(processes, settings, install, strategy) as pids:
        logs = [_beside(settings, rank, "out") for rank in range(processes)]
        outcomes = [wait(pid, log) for pid, log in zip(pids, logs, strict=True)]
    reports = [_beside(settings, rank, "json") for rank in range(processes)]
    return [
        Ended(o.code, o.said, json.loads(r.read_text()) if r.is_file() else {})
        for o, r in zip(outcomes, reports, strict=True)
    ]


def train_to_the_end(processes: int, settings: TrainConfig, **options: Any) -> list[dict[str, Any]]:
    """The same, where nothing may go wrong; the reports."""
    ended = train_on(processes, settings, **options)
    assert [e.code for e in ended] == [0] * processes, "\n".join(e.said[-3000:] for e in ended)
    return [e.report for e in ended]


@contextmanager
def joined(
    processes: int, settings: TrainConfig, install: Install = nothing, strategy: str = ""
) -> Iterator[list[int]]:
    """Start the processes; inside, they run and can be signalled."""
    name = strategy or ("none" if processes == 1 else "DDP")
    with tempfile.TemporaryDirectory() as meeting:
        pids = []
        for rank in range(processes):
            place = Place(rank, processes, name, Path(meeting) / "store")
            _beside(settings, rank, "json").unlink(missing_ok=True)
            work = _at(place, _reporting(place, settings, install))
            pids.append(start(work, _beside(settings, rank, "out")))
        try:
            yield pids
        except BaseException:
            end(pids)  # a process that waits for another one would outlive the test
            raise


def end(pids: list[int]) -> None:
    """Kill those of our children that still run."""
    for pid in pids:
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@dataclass(frozen=True)
class Place:
    """A process among others: which, of how many, doing what, and where they meet."""

    rank: int
    world: int
    strategy: str
    meeting: Path


def _beside(settings: TrainConfig, rank: int, suffix: str) -> Path:
    return log_of(settings).with_suffix(f".rank{rank}.{suffix}")


def _at(place: Place, work: Work) -> Work:
    """What a launcher does: tell the process where it stands, and join the others."""

    def placed() -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ["ACCELERATE_USE_FSDP"] = str(place.strategy == "FSDP").lower()
        if place.world > 1:
            os.environ.update(
                RANK=str(place.rank),
                LOCAL_RANK=str(place.rank),
                WORLD_SIZE=str(place.world),
                LOCAL_WORLD_SIZE=str(place.world),
                GLOO_SOCKET_IFNAME="lo",
            )
            torch.distributed.init_process_group(
                "gloo",
                rank=place.rank,
                world_size=place.world,
                store=torch.distributed.FileStore(str(place.meeting), place.world),
            )
        return work()

    return placed


def _reporting(place: Place, settings: TrainConfig, install: Install) -> Work:
    """The script, watched: what it exchanges, and the state that it ends with."""
    report: dict[str, Any] = {"exchanged": []}

    def watch() -> None:
        build, exchange = training.build_state, Parallel.require_equal

        def build_state(config: TrainConfig, components: Any, parallel: Parallel) -> Any:
            _require_topology(place, parallel)
            report["state"] = build(config, components, parallel)
            return report["state"]

        def require_equal(self: Parallel, digest: str, what: str) -> None:
            report["exchanged"].append([what, digest])
            exchange(self, digest, what)

        training.build_state = build_state
        Parallel.require_equal = require_equal  # type: ignore[method-assign]
        install(place.rank)

    arguments = log_of(settings).with_suffix(".yaml")
    arguments.write_text(config_text(settings), "utf-8")
    run = script(arguments, watch)

    def work() -> int:
        code = run()
        if "state" in report:
            report.update(_summary(report.pop("state")))
        _beside(settings, place.rank, "json").write_text(json.dumps(report))
        return code

    return work


def _require_topology(place: Place, parallel: Parallel) -> None:
    assert (parallel.world, parallel.rank, parallel.name) == (
        place.world,
        place.rank,
        place.strategy,
    )
    expected = DistributedType.NO if place.world == 1 else DistributedType.MULTI_CPU
    assert parallel.accelerator.distributed_type == expected
    assert torch.distributed.is_initialized() == (place.world > 1)


def _summary(state: Any) -> dict[str, Any]:
    scores = {} if state.competition is None else state.competition.state_dict()
    return {
        "step": state.step,
        "adapter": digest(adapter_tensors(state.components)),
        "optimizer": digest(
            {
                f"{index}.{key}": value
                for index, entries in state.optimizer.state_dict()["state"].items()
                for key, value in entries.items()
            }
        ),
        "allocator": digest(scores),
        "keep": {k: v for k, v in scores.items() if k.startswith("keep.")},
    }


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 over names and every bit of tensors and plain values."""
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def adapter(settings: TrainConfig) -> dict[str, Tensor]:
    return load_file(Path(settings.output_dir) / ADAPTER)


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Over all entries of all tensors; both must hold the same tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def events(settings: TrainConfig, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's log."""
    lines = (Path(settings.output_dir) / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began
