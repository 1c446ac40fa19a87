"""Real launches: what was asked for runs, or nothing does.

The commands in the headers of `configs/accelerate/` are the ones that run here, where the CPU
allows it; every other machine than one GPU's is a mismatch on a machine without GPUs.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_text
from tests.distributed.ranks import events, largest_difference, ten_steps, train_to_the_end
from tests.reliability.harness import ADAPTER

SCRIPT = "train_dreambooth_snella.py"
CONFIGS = ("cpu", "fsdp2", "multi_gpu", "multi_node", "one_gpu")
_LAUNCHER_VARIABLES = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")


def launch(
    command: str, root: Path, settings: TrainConfig, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a launcher's command (all before the script) on a run's settings, without GPUs."""
    path = Path(settings.output_dir).with_suffix(".yaml")
    path.write_text(config_text(settings), "utf-8")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER_VARIABLES)
    }
    words = [sys.executable, "-m", *shlex.split(command), SCRIPT, "--config", str(path)]
    return subprocess.run(
        words,
        cwd=root,
        env={**inherited, **variables, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def accelerate(options: str) -> str:
    return f"accelerate.commands.launch --main_process_port 0 {options}"


def torchrun(processes: int) -> str:
    return f"torch.distributed.run --standalone --nproc_per_node {processes}"


def require_refused(
    done: subprocess.CompletedProcess[str], settings: TrainConfig, message: str
) -> None:
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-3000:]
    assert not Path(settings.output_dir).exists(), "the refused launch wrote a run folder"


# The four traps: launchers that start something else than they were told.

REFUSED: dict[str, tuple[str, Mapping[str, str], str]] = {
    "cpu and a number": (
        accelerate("--cpu --num_processes 2"),
        {},
        "SnellaConfigError: asked for 2 x DDP, got 1 x none",
    ),
    "FSDP without a GPU": (
        torchrun(2),
        {"ACCELERATE_USE_FSDP": "true"},
        "SnellaConfigError: asked for 2 x FSDP, got 1 x none",
    ),
    "DeepSpeed without a GPU": (
        torchrun(2),
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        "SnellaConfigError: asked for 2 x DeepSpeed, got 1 x none",
    ),
}


@pytest.mark.row("D0")
@pytest.mark.parametrize("trap", REFUSED)
def test_another_topology_is_refused(
    repo_root: Path, tiny_base: Path, tmp_path: Path, row: Any, trap: str
) -> None:
    command, variables, message = REFUSED[trap]
    settings = ten_steps(tiny_base, tmp_path)
    done = launch(command, repo_root, settings, **variables)
    require_refused(done, settings, message)
    row.figure(message.partition(": ")[2])


@pytest.mark.row("D0")
def test_fsdp_on_the_cpu_is_not_dropped(
    repo_root: Path, tiny_base: Path, tmp_path: Path, row: Any
) -> None:
    """accelerate would run plain DDP here; the trainer shards by itself."""
    one = ten_steps(tiny_base, tmp_path / "one", train_batch_size=2)
    two = ten_steps(tiny_base, tmp_path / "two", train_batch_size=1)
    done = launch(
        torchrun(2), repo_root, two, ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    require_topology(two, 2, "FSDP")
    train_to_the_end(1, one)
    assert difference_of(one, two) <= 1e-6
    row.figure("FSDP on the CPU: 2 x FSDP runs")


def require_topology(settings: TrainConfig, processes: int, strategy: str) -> None:
    (begun,) = events(settings, "start")
    assert (begun["processes"], begun["strategy"]) == (processes, strategy)


def difference_of(one: TrainConfig, other: TrainConfig) -> float:
    return largest_difference(*(load_file(Path(s.output_dir) / ADAPTER) for s in (one, other)))


# The ready-made configs.


def header_command(file: Path) -> str:
    """The options of the `accelerate launch` command in a config's header."""
    lines = [line.removeprefix("#") for line in file.read_text("utf-8").splitlines()]
    start = next(i for i, line in enumerate(lines) if "accelerate launch" in line)
    end = next(i for i in range(start, len(lines)) if not lines[i].endswith("\\"))
    words = shlex.split(" ".join(line.removesuffix("\\") for line in lines[start : end + 1]))
    assert words[:2] == ["accelerate", "launch"]
    script = words.index(SCRIPT)
    assert words[script + 1 :] == ["--config", "configs/dreambooth/demo.yaml"]
    return shlex.join(words[2:script])


def test_the_configs_are_these(repo_root: Path) -> None:
    files = sorted(f.stem for f in (repo_root / "configs" / "accelerate").glob("*.yaml"))
    assert [name for name in files if not name.startswith("deepspeed")] == list(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_parses_and_its_header_names_it(repo_root: Path, name: str) -> None:
    file = repo_root / "configs" / "accelerate" / f"{name}.yaml"
    loaded = load_config_from_file(str(file))
    assert loaded.num_processes == {"one_gpu": 1, "multi_node": 8}.get(name, 2)
    assert loaded.mixed_precision == "no"  # the trainer's own setting
    assert f"--config_file configs/accelerate/{name}.yaml" in header_command(file)


@pytest.mark.row("D1")
def test_accelerate_launch_on_two_cpu_processes_trains_what_one_does(
    repo_root: Path, tiny_base: Path, tmp_path: Path, row: Any
) -> None:
    one = ten_steps(tiny_base, tmp_path / "one", train_batch_size=2)
    two = ten_steps(tiny_base, tmp_path / "two", train_batch_size=1)
    command = header_command(repo_root / "configs" / "accelerate" / "cpu.yaml")
    done = launch(accelerate(command), repo_root, two)
    assert done.returncode == 0, done.stderr[-3000:]
    require_topology(two, 2, "DDP")
    train_to_the_end(1, one)
    difference = difference_of(one, two)
    row.figure(f"accelerate launch with cpu.yaml: largest difference {difference:.1e}")
    assert difference <= 1e-6


@pytest.mark.full
@pytest.mark.parametrize(
    "name, variables, processes, strategy",
    [("one_gpu", {}, 1, "none"), ("fsdp2", {"ACCELERATE_USE_CPU": "true"}, 2, "FSDP")],
)
def test_header_commands_run(
    repo_root: Path,
    tiny_base: Path,
    tmp_path: Path,
    name: str,
    variables: dict[str, str],
    processes: int,
    strategy: str,
) -> None:
    settings = ten_steps(tiny_base, tmp_path, max_train_steps=2)
    command = header_command(repo_root / "configs" / "accelerate" / f"{name}.yaml")
    done = launch(accelerate(command), repo_root, settings, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    require_topology(settings, processes, strategy)


@pytest.mark.full
def test_a_config_for_gpus_is_refused_without_them(
    repo_root: Path, tiny_base: Path, tmp_path: Path
) -> None:
    settings = ten_steps(tiny_base, tmp_path)
    command = header_command(repo_root / "configs" / "accelerate" / "multi_gpu.yaml")
    done = launch(accelerate(command), repo_root, settings)
    require_refused(done, settings, "asked for 2 x DDP, got 1 x none: no GPU is visible")


@pytest.mark.full
def test_two_machines_join(repo_root: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Both launchers of the header's command, on one machine, with one CPU process each."""
    settings = ten_steps(tiny_base, tmp_path, max_train_steps=2)
    command = header_command(repo_root / "configs" / "accelerate" / "multi_node.yaml")
    port = free_port()
    launchers = []
    for rank in (0, 1):
        options = f"{command} --num_processes 2 --machine_rank {rank} --main_process_ip 127.0.0.1"
        launchers.append(
            start_launcher(f"{options} --main_process_port {port}", repo_root, settings)
        )
    for process in launchers:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
    require_topology(settings, 2, "DDP")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_launcher(options: str, root: Path, settings: TrainConfig) -> subprocess.Popen[str]:
    path = Path(settings.output_dir).with_suffix(".yaml")
    path.write_text(config_text(settings), "utf-8")
    words = shlex.split(f"-m accelerate.commands.launch {options} {SCRIPT} --config {path}")
    variables = {
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=root,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
