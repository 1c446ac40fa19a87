"""The training script as users start it: launcher, exit codes, signals, sudden death."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_dreambooth_snella
from snell_diffusion.diffusion.config_files import config_text
from tests import tiny_models
from tests.diffusion.training_runs import config

SCRIPT = "train_dreambooth_snella.py"
LAUNCH = ("accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--cpu")
LAUNCH = (*LAUNCH, "--mixed_precision=no", "--dynamo_backend=no")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_models.pipeline().save_pretrained(folder)
    return folder


def settings(base: Path, folder: Path, **changes: object) -> list[str]:
    """Arguments of a run in `folder`, which is made."""
    path = folder / "settings.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(config_text(config(base, folder, **changes)), "utf-8")
    return ["--config", str(path)]


def test_it_is_short(repo_root: Path) -> None:
    assert len((repo_root / SCRIPT).read_text().splitlines()) < 100


def test_accelerate_launch_trains(base: Path, tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", *LAUNCH, SCRIPT, *settings(base, tmp_path), "--seed", "5"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"adapter: {tmp_path / 'run' / 'pytorch_snella_weights.safetensors'}" in done.stdout
    assert "held-out loss of the subject: " in done.stdout
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    assert "seed: 5" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["--instance_data_dir", "nowhere"], "photo folder 'nowhere' does not exist"),
        (["--resume_from_checkpoint", "latest"], "holds no valid checkpoint; use 'auto'"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert train_dreambooth_snella.main([*settings(base, tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_exploding_run_exits_with_3(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(base, tmp_path, method="lora", learning_rate=1e30)
    assert train_dreambooth_snella.main(arguments) == 3
    assert "NonFiniteError: " in capsys.readouterr().err


def start(arguments: list[str], folder: Path) -> int:
    """Run the script in a forked process: imports are shared, so it starts at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        log = os.open(folder / "child.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = train_dreambooth_snella.main(arguments)
    finally:
        os._exit(code)
    return 0


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        log = run / "log.jsonl"
        if log.is_file() and f'"event": "step", "step": {step},' in log.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"no step {step} within {seconds} s")


def code_of(pid: int) -> int:
    """Exit code of a child; minus the signal if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of an undisturbed run of 12 steps."""
    folder = tmp_path_factory.mktemp("whole")
    assert code_of(start(settings(base, folder, max_train_steps=12), folder)) == 0
    return (folder / "run" / "pytorch_snella_weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_killed_and_resumed_gives_the_same_file(
    base: Path, tmp_path: Path, whole: bytes, signum: int, code: int
) -> None:
    arguments = settings(base, tmp_path, max_train_steps=12, checkpointing_steps=2)
    pid = start(arguments, tmp_path)
    wait_for_step(tmp_path / "run", 5)
    os.kill(pid, signum)
    assert code_of(pid) == code
    left = (tmp_path / "run" / "pytorch_snella_weights.safetensors").exists()
    assert left == (signum != signal.SIGKILL)  # a run that is asked to stop leaves what it has
    again = start([*arguments, "--resume_from_checkpoint", "latest"], tmp_path)
    assert code_of(again) == 0, (tmp_path / "child.log").read_text()[-2000:]
    assert (tmp_path / "run" / "pytorch_snella_weights.safetensors").read_bytes() == whole
    left = [p.name for p in (tmp_path / "run").rglob(".tmp*")]
    assert left == []
