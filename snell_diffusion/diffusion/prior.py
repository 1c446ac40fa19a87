"""Class images for prior preservation: use those given, generate those that are missing."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import SUFFIXES, Photo, Search, find_photos, list_files
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.files import write_json, write_with

RECIPE = "generated.json"
_SEARCH = Search(captions=False, most=None)


@dataclass(frozen=True)
class ClassImages:
    """The class images of one concept.

    Attributes:
        folder: Where they lie.
        prompt: What they show.
        wanted: How many.
        concept: Number of the concept.
        weight: Factor on their loss.
    """

    folder: Path
    prompt: str
    wanted: int
    concept: int = 0
    weight: float = 1.0

    @property
    def purpose(self) -> str:
        """What their start noise is drawn for: two concepts of one class get other pictures."""
        return f"class-{self.concept}" if self.concept else "class"

    def given(self) -> list[Photo]:
        """Check those that are there already, at most as many as wanted; none is fine."""
        folder = self.folder
        if not folder.is_dir() or not any(p.suffix.lower() in SUFFIXES for p in list_files(folder)):
            return []
        found = find_photos(folder, self.prompt, _SEARCH)[: self.wanted]
        mine = {"concept": self.concept, "weight": self.weight, "mask": None}
        return [replace(photo, **mine) for photo in found]


def class_images(config: TrainConfig, folder: RunFolder) -> list[ClassImages]:
    """What every concept with a class prompt needs; nothing where none are trained on."""
    if not config.uses_class_images:
        return []
    return [
        ClassImages(
            folder.class_images(concept),
            concept.class_prompt,
            concept.num_class_images or config.num_class_images,
            number,
            concept.weight,
        )
        for number, concept in enumerate(config.subjects)
        if concept.class_prompt
    ]


def require_recipes(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse class images that do not fit a new run, also where enough of them are there.

    Raises:
        SnellaConfigError: They were generated with another prompt or base, or two concepts with
            different class prompts would share a folder.
    """
    prompts: dict[Path, str] = {}
    for images in class_images(config, folder):
        other = prompts.setdefault(images.folder.resolve(), images.prompt)
        if other != images.prompt:
            raise SnellaConfigError(
                f"concepts of class_prompt '{other}' and '{images.prompt}' have the same "
                f"class_data_dir '{images.folder}': give each its own"
            )
        check_recipe(images.folder, _recipe(config, images))


def _recipe(config: TrainConfig, images: ClassImages) -> dict[str, str]:
    return {"prompt": images.prompt, "base": config.pretrained_model_name_or_path}


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
                f"this run has '{value}'; choose another class_data_dir or empty this one (if they "
                f"fit all the same, remove its {RECIPE})"
            )


def complete_images(
    config: TrainConfig,
    images: ClassImages,
    sampler: Sampler,
    progress: Callable[[int, int], None],
) -> None:
    """Generate class images until there are as many as wanted, each with its own fixed noise.

    Args:
        config: Base and batch.
        images: Which; their folder is created if it is missing.
        sampler: Draws with the base model (adapters off).
        progress: Called with (present, wanted) at the start and after each call of the pipeline.

    Raises:
        SnellaConfigError: The images there were generated with another prompt or base.
    """
    folder, wanted = images.folder, images.wanted
    present = len(images.given())
    if present >= wanted:
        return
    recipe = _recipe(config, images)
    check_recipe(folder, recipe)
    write_json(folder / RECIPE, recipe)
    progress(present, wanted)
    while present < wanted:
        indices = range(present, min(present + config.sample_batch_size, wanted))
        pictures = sampler.draw([images.prompt] * len(indices), images.purpose, indices)
        for index, picture in zip(indices, pictures, strict=True):
            mark = hashlib.sha256(picture.tobytes()).hexdigest()[:12]
            write_with(folder / f"class-{index:04d}-{mark}.png", picture.save, durable=False)
        present += len(pictures)
        progress(present, wanted)
