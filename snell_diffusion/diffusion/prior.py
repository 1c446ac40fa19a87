"""Class images for prior preservation: use those given, generate those that are missing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from snell_diffusion.diffusion.data import SUFFIXES, Photo, find_photos
from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.files import write_json, write_with

RECIPE = "generated.json"


def given_images(folder: Path, prompt: str) -> list[Photo]:
    """Check the class images that are there already; none is fine."""
    if not folder.is_dir() or not any(p.suffix.lower() in SUFFIXES for p in folder.iterdir()):
        return []
    return find_photos(folder, prompt, use_captions=False)


def check_recipe(folder: Path, recipe: dict[str, str]) -> None:
    """Refuse class images that were generated with another prompt or base.

    Raises:
        SnellaConfigError: The folder's note names another recipe.
    """
    path = folder / RECIPE
    if not path.is_file():
        return
    found = json.loads(path.read_text("utf-8"))
    for key, value in recipe.items():
        if found.get(key) != value:
            raise SnellaConfigError(
                f"the class images in '{folder}' were generated with {key} '{found.get(key)}', "
                f"this run has '{value}'; choose another class_data_dir or empty this one"
            )


def generate_images(
    folder: Path,
    count: int,
    prompt: str,
    recipe: dict[str, str],
    sampler: Sampler,
    batch: int,
    progress: Callable[[int], None],
) -> None:
    """Generate class images until the folder holds `count`, each with its own fixed noise.

    Args:
        folder: Where they go; created if missing.
        count: Images wanted in all.
        prompt: Class prompt.
        recipe: What they are made with; kept beside them.
        sampler: Draws with the base model (adapters off or not there yet).
        batch: Pictures per call.
        progress: Called with the number present after each call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = len(given_images(folder, prompt))
    write_json(folder / RECIPE, recipe)
    while present < count:
        indices = range(present, min(present + batch, count))
        pictures = sampler.draw([prompt] * len(indices), "class", indices)
        for index, picture in zip(indices, pictures, strict=True):
            mark = hashlib.sha256(picture.tobytes()).hexdigest()[:12]
            write_with(folder / f"class-{index:04d}-{mark}.png", picture.save, durable=False)
        present += len(pictures)
        progress(present)
