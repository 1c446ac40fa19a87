"""Flows of drawing, comparing and inspecting, with adapters that were really trained."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from playwright.sync_api import expect

from scripts.cookbook_photos import write_object, write_pet
from tests.app.browser.conftest import ROOT

FILE = "pytorch_snella_weights.safetensors"
# Enough for pictures to differ, in a few seconds.
QUICK: dict[str, Any] = {
    "max_train_steps": 24,
    "train_batch_size": 2,
    "learning_rate": 6.0e-3,
    "with_prior_preservation": False,
    "prior_loss": "images",
    "train_text_encoder": False,
    "sample_prompts": [],
    "validation_steps": None,
    "sample_steps": None,
}
KINDS = {"pet": write_pet, "object": write_object}
CLASSES = {"pet": "cat", "object": "bowl"}


def train(folder: Path, kind: str) -> Path:
    """The adapter file of a short run of a cookbook recipe, named for its kind."""
    KINDS[kind](folder / kind)
    recipe = yaml.safe_load((ROOT / "configs" / "dreambooth" / f"recipe_{kind}.yaml").read_text())
    settings = {
        **recipe,
        **QUICK,
        "initializer_token": CLASSES[kind],
        "instance_data_dir": str(folder / kind / "photos"),
        "validation_data_dir": None,
        "output_dir": str(folder / kind / "output"),
    }
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(settings))
    command = [
        sys.executable,
        "train_dreambooth_snella.py",
        "--config",
        str(folder / f"{kind}.yaml"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / kind / "output" / FILE).rename(folder / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A cat's and a cup's adapter file."""
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: train(folder, kind) for kind in KINDS}


def upload(visitor, path: Path) -> None:
    """Upload an adapter in the open Generate tab and wait until it is chosen."""
    visitor.give(visitor.at("generate-upload"), path)
    chosen = visitor.at("generate-adapter-1").locator("input")
    expect(chosen).to_have_value(re.compile(path.stem))


def choose(visitor, elem_id: str, text: str) -> None:
    """Choose from a list."""
    visitor.at(elem_id).locator("input").click()
    visitor.page.get_by_role("option", name=re.compile(text)).click()


def draw(visitor, prompt: str) -> None:
    """Draw a prompt and wait for the picture."""
    visitor.at("generate-prompt").locator("textarea").fill(prompt)
    visitor.at("generate-draw").click()
    progress = visitor.at("generate-progress")
    expect(progress).not_to_contain_text("Done")  # of the picture before
    expect(progress).to_contain_text("Done")


def pixels(locator) -> np.ndarray:
    """What a place on the screen shows."""
    with Image.open(io.BytesIO(locator.screenshot())) as picture:
        return np.asarray(picture.convert("RGB"), np.int16)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two equally large pictures, in 0 to 255."""
    assert one.shape == other.shape
    return float(np.abs(one - other).mean())


def test_from_the_first_visit_to_a_picture(visit):
    visitor = visit()
    visitor.tab("Generate")
    draw(visitor, "a photo of a cat on the beach")
    picture = visitor.at("generate-gallery").locator("img").first
    expect(picture).to_be_visible()
    assert pixels(picture).std() > 10
    visitor.snap("first-picture")


def test_an_adapter_changes_the_picture_and_its_sparsity_changes_it_again(visit, adapters, publish):
    visitor = visit()
    visitor.tab("Generate")
    upload(visitor, adapters["pet"])
    draw(visitor, "a photo of a <chelsea> cat on a wooden floor")
    expect(visitor.at("generate-slider")).to_be_visible()
    visitor.at("generate-sparsity-mode").get_by_label("Set here").click()
    level = visitor.at("generate-sparsity").locator("input[type=range]")
    level.fill("0.98")
    level.dispatch_event("pointerup")
    expect(visitor.at("generate-sparse").locator("img")).to_be_visible()
    expect(visitor.at("generate-kept")).to_contain_text("at sparsity 0.98")
    as_trained = pixels(visitor.at("generate-as-trained").locator("img"))
    sparse = pixels(visitor.at("generate-sparse").locator("img"))
    assert difference(as_trained, sparse) > 1
    publish(visitor.snap("sparsity"), "app_generate.png")


def test_two_adapters_draw_one_picture(visit, adapters):
    visitor = visit()
    visitor.tab("Generate")
    upload(visitor, adapters["object"])
    prompt = "a photo of a <chelsea> cat and a <cup> bowl on a wooden floor"
    draw(visitor, prompt)
    picture = visitor.at("generate-gallery").locator("img").first
    alone = pixels(picture)
    choose(visitor, "generate-adapter-2", "pet")
    draw(visitor, prompt)
    assert difference(alone, pixels(picture)) > 1
    visitor.snap("two-adapters")


def test_a_bad_adapter_is_refused_with_a_next_step(visit, tmp_path):
    bad = tmp_path / "broken.safetensors"
    bad.write_bytes(b"PK\x03\x04" + bytes(2000))
    visitor = visit()
    visitor.tab("Generate")
    visitor.give(visitor.at("generate-upload"), bad)
    said = visitor.page.get_by_test_id("toast-body")
    expect(said).to_contain_text("broken is not a whole .safetensors file")
    expect(said).to_contain_text("choose the pytorch_snella_weights.safetensors of a SNELLA run")
    visitor.snap("bad-adapter")


def test_a_grid_compares_strengths_and_sparsities(visit, adapters, publish, tmp_path):
    visitor = visit()
    visitor.tab("Generate")
    upload(visitor, adapters["pet"])
    visitor.tab("Compare")
    choose(visitor, "compare-adapter-1", "pet")
    visitor.at("compare-prompt").locator("textarea").fill("a photo of a <chelsea> cat in the snow")
    visitor.at("compare-draw").click()
    expect(visitor.at("compare-progress")).to_contain_text("Done")
    expect(visitor.at("compare-grid").locator("img")).to_be_visible()
    with visitor.page.expect_download() as download:
        visitor.at("compare-download").click()
    download.value.save_as(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.format == "PNG"
        assert min(grid.size) > 200
    publish(visitor.snap("compare"), "app_compare.png")


def test_an_adapter_is_inspected_alone_and_beside_another(visit, adapters, publish):
    visitor = visit()
    visitor.tab("Generate")
    for kind in KINDS:
        upload(visitor, adapters[kind])
    visitor.tab("Inspect")
    choose(visitor, "inspect-adapter", "pet")
    expect(visitor.at("inspect-facts")).to_contain_text("snella")
    expect(visitor.at("inspect-map").locator("img")).to_be_visible()
    expect(visitor.at("inspect-sizes").locator("img")).to_be_visible()
    choose(visitor, "inspect-other", "object")
    expect(visitor.at("inspect-overlap")).to_contain_text("%")
    publish(visitor.snap("inspect"), "app_inspect.png")
