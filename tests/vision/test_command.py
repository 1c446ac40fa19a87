"""The command: methods, training, prediction, exit codes; several processes; a signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from snell_diffusion.training.errors import Interrupted
from snell_diffusion.vision.__main__ import main
from snell_diffusion.vision.config import config_text
from snell_diffusion.vision.method import LINEAR_PROBE, method_names
from snell_diffusion.vision.run import run
from tests.vision import runs

_LAUNCHER_VARIABLES = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")


def test_list_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == set(method_names())


def test_train_and_predict(
    bases: dict[str, str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.config(
        bases["vit"], pictures, tmp_path, method="lora", rank=4, num_train_epochs=8
    )
    (tmp_path / "a.yaml").write_text(config_text(config))
    assert main(["--config", str(tmp_path / "a.yaml"), "--learning_rate", "0.02"]) == 0
    said = capsys.readouterr().out
    assert "test accuracy: " in said
    assert "adapter_model.safetensors" in said
    images = [str(pictures / "test" / name / "0.png") for name in runs.CLASSES]
    assert main(["predict", str(tmp_path / "run"), *images, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, image, name in zip(lines, images, runs.CLASSES, strict=True):
        assert line.startswith(f"{image}: {name} ")
        assert line.count("%") == 2


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--method", "lora", "--rang", "3"], 2, "unknown argument '--rang'"),
        (["--base", "nowhere", "--method", LINEAR_PROBE], 2, "base 'nowhere' could not be loaded"),
        (["predict", "nowhere", "x.png"], 2, "image 'x.png' is missing"),
        (["predict", "nowhere", __file__], 2, "is no picture"),
        (["predict", ".", "README", "--top", "0"], 2, "--top must be at least 1"),
    ],
)
def test_exit_codes(
    arguments: list[str],
    code: int,
    message: str,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[0] != "predict":
        arguments = [*arguments, "--dataset", "image_folder", "--data_dir", str(pictures)]
        arguments += ["--output_dir", str(tmp_path / "run")]
    assert main(arguments) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folder_without_classifier(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(pictures / "test" / "red" / "0.png")
    assert main(["predict", str(pictures), image]) == 2
    assert "holds no trained classifier" in capsys.readouterr().err


def test_signal_stops_and_run_continues(
    bases: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """SIGTERM in the middle of an epoch: the state is saved, and continued to the same bits."""
    shared: dict[str, Any] = {"method": "snella", "rank": 4, "dropout": 0.2}
    whole = run(runs.config(bases["vit"], pictures, None, **shared))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    config = runs.config(bases["vit"], pictures, tmp_path, **shared)
    with pytest.raises(Interrupted, match="stopped after step 2, the state is in") as caught:
        run(config, on_event=stop)
    assert caught.value.exit_code == 143
    again = runs.config(bases["vit"], pictures, tmp_path, resume_from_checkpoint="latest", **shared)
    states = [one.classifier.model.state_dict() for one in (run(again), whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def test_two_processes_train_what_one_trains(
    bases: dict[str, str], pictures: Path, tmp_path: Path, repo_root: Path
) -> None:
    """Through `accelerate launch`, with half the images on each: the same but for rounding."""
    shared: dict[str, Any] = {"method": "snella", "rank": 4, "random_flip": True}
    one = runs.config(bases["vit"], pictures, tmp_path / "one", train_batch_size=8, **shared)
    two = runs.config(bases["vit"], pictures, tmp_path / "two", train_batch_size=4, **shared)
    (tmp_path / "two.yaml").write_text(config_text(two))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", "configs/accelerate/cpu.yaml", "-m", "snell_diffusion.vision"]
    done = subprocess.run(
        [sys.executable, *launch, "--config", str(tmp_path / "two.yaml")],
        cwd=repo_root,
        env={**inherited, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test accuracy") == 1  # the main process alone speaks
    result = run(one)
    assert f"test accuracy: {result.test_accuracy:.2%}" in done.stdout
    for name in ("pytorch_snella_weights.safetensors", "head.safetensors"):
        mine = load_file(tmp_path / "one" / "run" / name)
        theirs = load_file(tmp_path / "two" / "run" / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            if not key.endswith("_threshold"):
                torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=2e-3, msg=key)
