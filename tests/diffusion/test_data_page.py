"""The folders and settings on docs/data.md are read as the page says; its example config runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from snell_diffusion.diffusion.config_files import KEYS, make_config, parse_config
from snell_diffusion.diffusion.data import Photo, find_photos
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.diffusion.training import run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
TWO_SUBJECTS = PAGE.parents[1] / "configs" / "dreambooth" / "two_subjects.yaml"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def tree(block: str) -> list[Path]:
    """The files of a drawn tree."""
    first, *lines = block.splitlines()
    inside, files = [Path(first)], []
    for line in lines:
        bars, name = re.fullmatch(r"((?:│   |    )*)[├└]── (.+)", line).groups()  # type: ignore[union-attr]
        path = inside[len(bars) // 4] / name
        inside[len(bars) // 4 + 1 :] = [path]
        files.append(path)
    return [path for path in files if path.suffix]


def picture(path: Path, grey: bool = False) -> None:
    shape = (80, 96) if grey else (80, 96, 3)
    seed = sum(str(path).encode())
    pixels = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder of the page that users make, with pictures in it."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("text"):
        for path in tree(block):
            if path.suffix in (".jpg", ".png"):
                picture(path, grey="mask" in str(path.relative_to(path.parts[0])))
            elif path.suffix == ".txt":
                path.write_text("from the text file")
    (line,) = re.findall(r'`({"file_name".*?})`', PAGE.read_text("utf-8"))
    Path("photos/metadata.jsonl").write_text(line)


def read(**settings: object) -> list[Photo]:
    config = make_config({"instance_prompt": "the prompt", **settings})
    return Photos.find(config, RunFolder(config)).instance


def test_captions_are_found(folders: None) -> None:
    line = json.loads(Path("photos/metadata.jsonl").read_text())
    prompts = [photo.prompt for photo in find_photos("photos", "the prompt")]
    assert prompts == [line["text"], "from the text file"]
    plain = read(instance_data_dir="photos", use_captions=False)
    assert {photo.prompt for photo in plain} == {"the prompt"}


def test_masks_are_found(folders: None) -> None:
    photos = read(instance_data_dir="masked", masked_loss=True)
    masks = [str(photo.mask.path) for photo in photos if photo.mask]
    assert masks == ["masked/01.mask.png", "masked/masks/02.png"]


def test_concepts_are_read(folders: None) -> None:
    (block,) = blocks("yaml")
    photos = read(instance_prompt=None, **yaml.safe_load(block))
    assert [p.concept for p in photos for _ in range(p.repeats)] == [0, 0, 0, 1, 1, 1]
    assert {p.weight for p in photos} == {1.0, 0.5}


def test_the_page_names_settings_that_exist() -> None:
    text = PAGE.read_text("utf-8")
    named = {w for w in re.findall(r"`(\w+)(?:: [^`]*)?`", text) if "_" in w}
    assert named - {"file_name"} <= set(KEYS)
    assert {"concepts", "masked_loss", "unmasked_weight", "cache_dir", "prior_loss"} <= set(
        re.findall(r"`(\w+)", text)
    )


def test_the_example_config_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "cup"):
        for number in range(2):
            picture(Path("photos", name, f"{number}.jpg"))
    quick = (
        "--max_train_steps 1 --train_batch_size 1 --rank 4 --validation_timesteps 1 "
        "--num_inference_steps 1 --output_dir run"
    )
    config = parse_config(["--config", str(TWO_SUBJECTS), *quick.split()])
    result = run(config)
    assert result.adapter_path is not None
    (step,) = (e for e in result.history if e["event"] == "step")
    assert step["loss_prior"] >= 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained on 2 photos with `a photo of a sks dog` and `a photo of a qwx cup`" in card
