"""`python -m snell_diffusion.compress`, on a classifier and on a pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from snell_diffusion.compress import load_compressed
from snell_diffusion.compress.__main__ import main
from snell_diffusion.compress.sources import recorded_calls, replay
from tests.compress.models import pixels, small_vit
from tests.tiny_models import pipeline


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    folder = tmp_path / "vit"
    model = small_vit()
    model.config.id2label = {k: f"class{k}" for k in range(12)}
    model.config.label2id = {f"class{k}": k for k in range(12)}
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures in folders named as two of the classes."""
    rng = np.random.default_rng(0)
    for k in range(12):
        folder = tmp_path / "pictures" / f"class{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
    return tmp_path / "pictures"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("labelled", [True, False])
def test_classifier(
    classifier: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    labelled: bool,
) -> None:
    if not labelled:
        (pictures / "class1").rename(pictures / "something else")
    out = tmp_path / "half"
    status, text, _ = run(
        *(capsys, "--model", classifier, "--images", pictures, "--output", out),
        *("--ratio", 2, "--steps", 3, "--batch", 4, "--weight", 1, "--dtype", "float16"),
    )
    assert status == 0
    assert "10 pictures to learn from, 2 held out" in text
    assert "step 3 of 3" in text
    assert "s left" in text
    result = json.loads((out / "distillation.json").read_text())
    assert result["parameters"]["after"] < result["parameters"]["before"]
    for when in ("before", "after"):
        found = result["held_out"][when]
        assert ("task" in found) == ("accuracy" in found) == labelled
        assert found["features"] > 0
        assert found["penalty"] > 0
    assert result["settings"]["kd_beta"] == (0.0 if labelled else 1.0)
    assert load_compressed(out)(pixels()).logits.shape == (4, 12)


def test_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, prompts, out = tmp_path / "base", tmp_path / "prompts.txt", tmp_path / "half"
    pipeline().save_pretrained(base)
    prompts.write_text("a cat\na dog\n\na fox\n")
    status, text, error = run(
        *(capsys, "--model", base, "--prompts", prompts, "--output", out, "--steps", 4),
        *("--batch", 1, "--draw-steps", 2, "--lr", 1e-3),
    )
    assert status == 0, error
    assert "drew 3 of 3 prompts" in text
    assert "4 calls to learn from, 2 of other prompts held out" in text
    result = json.loads((out / "distillation.json").read_text())
    assert result["settings"]["kd_beta"] == 1.0
    assert set(result["held_out"]["after"]) == {"features", "output"}
    pipe = pipeline()
    pipe.unet = load_compressed(out)
    image = pipe("a cat", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (32, 32, 3)


def test_zero_steps_only_compress(
    classifier: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half"
    status, text, _ = run(
        *(capsys, "--model", classifier, "--images", pictures, "--output", out, "--steps", 0)
    )
    assert status == 0
    held_out = json.loads((out / "distillation.json").read_text())["held_out"]
    assert held_out["before"] == held_out["after"]
    assert "s left" not in text


def test_refusals(
    classifier: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        status, _, error = run(capsys, *arguments)
        assert status == 1
        return error

    out = tmp_path / "out"
    base = ("--model", classifier, "--output", out)
    assert "give pictures with --images" in refused(*base)
    (tmp_path / "empty").mkdir()
    assert "must hold pictures" in refused(*base, "--images", tmp_path / "empty")
    assert "batch must be 1 or more" in refused(*base, "--images", pictures, "--batch", 0)
    assert "ratio must be 1 or more" in refused(*base, "--images", pictures, "--ratio", 0.5)
    (pictures / "broken.png").write_text("no picture")
    assert "broken.png cannot be read as a picture" in refused(*base, "--images", pictures)
    (tmp_path / "none").mkdir()
    nothing = ("--model", tmp_path / "none", "--output", out)
    assert "no image classifier in" in refused(*nothing, "--images", pictures)
    tiny = tmp_path / "tiny"
    pipeline().save_pretrained(tiny)
    assert "give prompts with --prompts" in refused("--model", tiny, "--output", out)
    few = tmp_path / "few.txt"
    few.write_text("a cat\n")
    line = refused("--model", tiny, "--output", out, "--prompts", few)
    assert "must hold more than the 16 prompts of one batch" in line
    assert not out.exists()
    out.mkdir()
    (out / "something").touch()
    assert "new or empty folder" in refused(*base, "--images", pictures)


def test_recorded_calls_replay_what_the_pipeline_computed() -> None:
    pipe = pipeline()
    seen = []
    handle = pipe.unet.register_forward_hook(lambda m, args, out: seen.append(out[0].clone()))
    calls = recorded_calls(pipe, ["a cat", "a dog"], 2, 0, num_inference_steps=3)
    handle.remove()
    assert [len(part) for part in calls] == [3]
    assert not pipe.unet._forward_pre_hooks
    with torch.no_grad():
        for call, want in zip(calls[0], seen, strict=True):
            torch.testing.assert_close(replay(pipe.unet, call), want, rtol=0, atol=0)
