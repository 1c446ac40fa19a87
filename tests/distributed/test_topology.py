"""What a launcher was told is read from its own command line, by accelerate's own parser."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.parallel import Topology, topology
from snell_diffusion.training.parallel.launcher import Launch, launch_arguments, read_launch


@pytest.mark.parametrize(
    "line",
    [
        "/env/bin/python /env/bin/accelerate launch --cpu train.py",
        "accelerate launch --cpu train.py",
        "/env/bin/python /env/bin/accelerate-launch --cpu train.py",
        "python -m accelerate.commands.launch --cpu train.py",
        "python -m accelerate.commands.accelerate_cli launch --cpu train.py",
    ],
)
def test_a_launcher_is_recognised(line: str) -> None:
    assert launch_arguments(shlex.split(line)) == ["--cpu", "train.py"]


@pytest.mark.parametrize(
    "line",
    [
        "python train.py accelerate launch",
        "accelerate config",
        "bash -c 'accelerate launch --cpu train.py'",
        "torchrun --nproc_per_node 2 train.py",
        "",
    ],
)
def test_other_commands_are_not(line: str) -> None:
    assert launch_arguments(shlex.split(line)) is None


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--cpu --num_processes 2", Launch(2, "", True)),
        ("--num_processes 1", Launch(1, "", False)),
        ("--use_fsdp --num_processes 4", Launch(4, "FSDP", False)),
        ("--use_deepspeed --num_processes 2", Launch(2, "DeepSpeed", False)),
        ("--config_file cpu.yaml", Launch(2, "", True)),
        ("--config_file cpu.yaml --num_processes 4", Launch(4, "", True)),
        ("--config_file fsdp2.yaml", Launch(2, "FSDP", False)),
        ("--config_file fsdp2.yaml --cpu", Launch(2, "FSDP", True)),
        ("--config_file fsdp2.yaml --multi_gpu", Launch(2, "", False)),
        ("--use_megatron_lm --num_processes 2", Launch(2, "Megatron-LM", False)),
        ("--config_file multi_node.yaml --machine_rank 1", Launch(8, "", False)),
    ],
)
def test_arguments_and_config_file_are_read(repo_root: Path, line: str, expected: Launch) -> None:
    arguments = [*shlex.split(line), "train.py", "--config", "x.yaml", "--num_processes", "9"]
    assert read_launch(arguments, repo_root / "configs" / "accelerate") == expected


def test_nothing_said_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = str(tmp_path / "none.yaml")
    monkeypatch.setattr("snell_diffusion.training.parallel.launcher.default_config_file", absent)
    assert read_launch(["train.py"], tmp_path) == Launch(None, "", False)


@pytest.mark.parametrize(
    "launch, variables, expected",
    [
        (None, {}, Topology(1, "none")),
        (None, {"WORLD_SIZE": "2"}, Topology(2, "DDP")),
        (None, {"OMPI_COMM_WORLD_SIZE": "2"}, Topology(2, "DDP")),
        (None, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, Topology(2, "FSDP")),
        (
            None,
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "yes"},
            Topology(2, "DeepSpeed", cpu=True),
        ),
        (Launch(2, "", True), {}, Topology(2, "DDP", cpu=True)),
        (Launch(2, "FSDP", True), {}, Topology(2, "FSDP", cpu=True)),
        (Launch(None, "", False), {"WORLD_SIZE": "3"}, Topology(3, "DDP")),
        (Launch(4, "", False), {"WORLD_SIZE": "3"}, Topology(4, "DDP")),
    ],
)
def test_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    launch: Launch | None,
    variables: dict[str, str],
    expected: Topology,
) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(topology, "find_launch", lambda: launch)
    assert topology.asked() == expected


class Alone:
    """An accelerator that believes to be the only process."""

    num_processes = 1


def test_a_mismatch_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "asked", lambda: Topology(4, "FSDP"))
    devices: list[bool] = []

    def make(cpu: bool) -> Any:
        devices.append(cpu)
        return Alone()

    with pytest.raises(SnellaConfigError, match="asked for 4 x FSDP, got 1 x none: "):
        topology.start(make)
    assert devices == [False]


def test_a_strategy_that_is_not_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "asked for 2 x Megatron-LM, which this trainer does not run; it runs DDP, FSDP and"
    with pytest.raises(SnellaConfigError, match=message):
        topology.start(lambda cpu: Alone())  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"FSDP_VERSION": "1"}, "FSDP version 1 was asked for; .* set fsdp_version: 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient_checkpointing"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "sets fsdp_offload_params; turn it off there and use"),
    ],
)
def test_sharding_settings_that_cannot_be_followed_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    from snell_diffusion.training.parallel.fsdp import ShardedBase

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SnellaConfigError, match=message):
        ShardedBase(Alone())  # type: ignore[arg-type]
