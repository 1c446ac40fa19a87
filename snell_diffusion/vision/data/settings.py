"""Settings of the images of a classification run: where they are, how they are split and shown.

A run's config inherits `Data`, so these names are the keys of its YAML file and its flags.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from snell_diffusion.training.config_types import FROZEN, Count, Finite, Whole, described

_help = described
_PartShare = Annotated[float, Field(gt=0, lt=1)]

Layout = Literal["image_folder", "fgvc", "vtab", "digits", "skimage"]
NEED_FOLDER = ("image_folder", "fgvc", "vtab")
NEED_TASK = ("fgvc", "vtab")


@dataclass(**FROZEN)
class Data:
    """Images, splits, few-shot selection and preprocessing."""

    dataset: Layout = _help(
        "digits",
        "Where the images come from: image_folder (a folder per class), fgvc (train.json, val.json "
        "and test.json beside the images), vtab (train800.txt, val200.txt, ... beside the images), "
        "digits (with scikit-learn) or skimage (with scikit-image).",
    )
    data_dir: str | None = _help(
        None,
        "Folder of the data set, or for fgvc and vtab the folder that holds it. digits and skimage "
        "have none.",
    )
    task: str | None = _help(
        None,
        "Which data set of a collection: cub, nabirds, flowers, cars or dogs for fgvc; the name of "
        "the task's folder for vtab.",
    )
    protocol: Literal["validation", "paper"] = _help(
        "validation",
        "Whose defaults the other settings take: validation = ours, paper = those of the published "
        "scripts, in their order of operations. Both choose on validation images; see select_on.",
    )
    shots: Count | None = _help(
        None, "Training images per class, at least 1, chosen by seed. Default: all."
    )
    validation_shots: Count | None = _help(
        None, "Validation images per class, at least 1, chosen by seed. Default: all."
    )
    validation_fraction: _PartShare = _help(
        0.1, "Share of the images kept for validation, 0 to 1, where no such split is on disk."
    )
    test_fraction: _PartShare = _help(
        0.2, "Share of the images kept for test, 0 to 1, where no such split is on disk."
    )
    split_seed: Whole = _help(
        0, "Seed of those two splits, at least 0; apart from seed, so that all seeds share a test."
    )
    transform: Literal["resize", "center_crop", "random_resized_crop"] = _help(
        "resize",
        "resize: the whole image, squeezed to the model's size. center_crop: the shorter side fits "
        "a little above it, the centre is cut. random_resized_crop: for training a random part of "
        "a random size, for measuring as center_crop.",
    )
    resolution: Annotated[int, Field(ge=8, le=4096)] | None = _help(
        None, "Side of the square images in pixels, 8 to 4096. Default: the model's."
    )
    crop_share: Annotated[float, Field(gt=0, le=1)] = _help(
        0.875, "Side of the centre crop over the image's shorter side, above 0 to 1."
    )
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = _help(
        0.08, "Smallest share of the image's area that a random crop shows, above 0 to 1."
    )
    random_flip: bool | None = _help(
        None, "Mirror half of the training images. Default: only with random_resized_crop."
    )
    padding: Annotated[int, Field(ge=0, le=256)] = _help(
        0, "Black border in pixels of the image as it is stored, 0 to 256, before it is scaled."
    )
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = _help(
        None, "How images are scaled. Default: as the model's preprocessor_config.json says."
    )
    image_mean: list[Finite] = _help(
        [], "Subtracted from red, green and blue (0 to 1). Default: preprocessor_config.json."
    )
    image_std: list[Finite] = _help(
        [], "What red, green and blue are divided by then. Default: preprocessor_config.json."
    )
    check_images: Literal["files", "headers", "pixels"] = _help(
        "headers",
        "What is checked of every image file before training: files = that it is there, headers = "
        "that it opens, pixels = that all of it can be decoded.",
    )
    cache_images: bool = _help(
        True,
        "Keep scaled images in memory (8 bits a value, 1 GiB at most) where they look the same in "
        "every epoch.",
    )
    num_workers: Whole = _help(
        0, "Threads that read the images of a batch, at least 0 (0 = none); the result is the same."
    )

    @model_validator(mode="after")
    def _consistent_data(self) -> "Data":
        if self.dataset in NEED_FOLDER and not self.data_dir:
            raise ValueError(f"data_dir is missing: dataset {self.dataset} is read from a folder")
        if self.dataset not in NEED_FOLDER and self.data_dir:
            raise ValueError(f"data_dir has no effect: dataset {self.dataset} is not in a folder")
        if self.dataset in NEED_TASK and not self.task:
            raise ValueError(f"task is missing: dataset {self.dataset} is a collection of several")
        if self.dataset not in NEED_TASK and self.task:
            raise ValueError(f"task has no effect with dataset {self.dataset}")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction and test_fraction must leave something to train on, got "
                f"{self.validation_fraction} and {self.test_fraction}"
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) not in (0, 3):
                raise ValueError(f"{name} should have 3 numbers, got {len(getattr(self, name))}")
        if any(value <= 0 for value in self.image_std):
            raise ValueError(f"image_std should be above 0, got {self.image_std}")
        return self

    @property
    def flips(self) -> bool:
        """Whether half of the training images are mirrored."""
        crops = self.transform == "random_resized_crop"
        return crops if self.random_flip is None else self.random_flip
