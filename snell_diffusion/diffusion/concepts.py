"""The concepts of a run: subjects learnt together, each with photos and prompts of its own.

A run without `concepts` has one, made of the plain settings (instance_data_dir and so on).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic.dataclasses import dataclass

from snell_diffusion.diffusion.config_types import Prompt
from snell_diffusion.training.config_types import FROZEN, Count, Positive, Whole, described


@dataclass(**FROZEN)
class ConceptConfig:
    """One of several subjects of a run: an entry of `concepts`."""

    instance_data_dir: str = described("", "Folder with this concept's photos; must be given.")
    instance_prompt: Prompt = described(
        "", "Prompt of its photos, with its own rare token; must be given."
    )
    name: str | None = described(
        None,
        "What logs and folders call it: letters, digits, '_', '-' and '.'. Default: the name of "
        "its photo folder.",
    )
    class_data_dir: str | None = described(
        None,
        "Folder with its class images; missing ones are generated there. Default: in output_dir.",
    )
    class_prompt: Prompt | None = described(
        None, "Prompt of its class without the token. Without one it has no prior preservation."
    )
    num_class_images: Count | None = described(
        None, "Class images wanted for it; at least 1. Default: num_class_images of the run."
    )
    repeats: Count = described(
        1, "How often each of its photos comes in an epoch; at least 1. Balances unequal folders."
    )
    weight: Positive = described(
        1.0, "Factor on the loss of its photos and of its class images, above 0."
    )
    validation_data_dir: str | None = described(
        None, "Folder with photos of it that are not trained on, for the held-out loss."
    )
    num_validation_photos: Whole | None = described(
        None,
        "Photos taken out of its instance_data_dir for the held-out loss (the last by name). "
        "Default: num_validation_photos of the run.",
    )


# What has no place beside `concepts`, because each concept has its own.
OWN = ("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt")
OWN_HELD_OUT = "validation_data_dir"


def named(concepts: Sequence[ConceptConfig]) -> list[ConceptConfig]:
    """The same concepts, each with a name of its own.

    Raises:
        ValueError: A field that must be given is missing, or a name is odd or there twice.
    """
    found = []
    for number, concept in enumerate(concepts):
        for key in ("instance_data_dir", "instance_prompt"):
            if not getattr(concept, key):
                raise ValueError(f"concepts.{number} has no {key}")
        if concept.validation_data_dir is not None and concept.num_validation_photos:
            raise ValueError(
                f"concepts.{number}: give validation_data_dir or num_validation_photos, not both"
            )
        found.append(replace(concept, name=concept.name or _folder_name(concept)))
    for name, times in Counter(concept.name for concept in found).items():
        if not re.fullmatch(r"[\w-][\w.-]*", str(name)):
            raise ValueError(
                f"concept name '{name}' should hold letters, digits, '_', '-' and '.', and not "
                f"begin with a dot"
            )
        if times > 1:
            raise ValueError(f"{times} concepts are called '{name}': give each its own name")
    return found


def _folder_name(concept: ConceptConfig) -> str:
    folder = Path(concept.instance_data_dir)
    name = re.sub(r"[^\w.-]+", "_", folder.name or folder.resolve().name)
    return name.lstrip(".") or "concept"
