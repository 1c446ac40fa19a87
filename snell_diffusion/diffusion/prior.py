"""Class images for prior preservation: use those given, generate those that are missing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import SUFFIXES, Photo, find_photos, list_files
from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.files import write_json, write_with

RECIPE = "generated.json"


def given_images(folder: Path, prompt: str) -> list[Photo]:
    """Check the class images that are there already; none is fine."""
    if not folder.is_dir() or not any(p.suffix.lower() in SUFFIXES for p in list_files(folder)):
        return []
    return find_photos(folder, prompt, use_captions=False, most=None)


def check_recipe(folder: Path, recipe: dict[str, str]) -> None:
    """Refuse class images that were generated with another prompt or base.

    Raises:
        SnellaConfigError: The folder's note names another recipe.
    """
    path = folder / RECIPE
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        given = {key: found[key] for key in recipe}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SnellaConfigError(
            f"the note of the class images, '{path}', cannot be read: remove the class images with "
            f"it, or choose another class_data_dir"
        ) from error
    for key, value in recipe.items():
        if given[key] != value:
            raise SnellaConfigError(
                f"the class images in '{folder}' were generated with {key} '{given[key]}', "
                f"this run has '{value}'; choose another class_data_dir or empty this one"
            )


def complete_images(
    config: TrainConfig,
    folder: Path,
    sampler: Sampler,
    progress: Callable[[int, int], None],
) -> None:
    """Generate class images until `folder` holds num_class_images, each with its own fixed noise.

    Args:
        config: Class prompt, count, base and batch.
        folder: Where they go; created if missing.
        sampler: Draws with the base model (adapters off).
        progress: Called with (present, wanted) at the start and after each call of the pipeline.

    Raises:
        SnellaConfigError: The images there were generated with another prompt or base.
    """
    prompt, wanted = str(config.class_prompt), config.num_class_images
    present = len(given_images(folder, prompt))
    if present >= wanted:
        return
    recipe = {"prompt": prompt, "base": config.pretrained_model_name_or_path}
    check_recipe(folder, recipe)
    write_json(folder / RECIPE, recipe)
    progress(present, wanted)
    while present < wanted:
        indices = range(present, min(present + config.sample_batch_size, wanted))
        pictures = sampler.draw([prompt] * len(indices), "class", indices)
        for index, picture in zip(indices, pictures, strict=True):
            mark = hashlib.sha256(picture.tobytes()).hexdigest()[:12]
            write_with(folder / f"class-{index:04d}-{mark}.png", picture.save, durable=False)
        present += len(pictures)
        progress(present, wanted)
