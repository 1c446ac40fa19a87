"""Ready-made training settings: kind of subject x effort, for the shipped bases and for any other.

The values of the shipped bases are those of the cookbook's recipes (docs/cookbook.md), which were
measured: 90 steps are the recipes' own. For other bases they are common practice, not measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from snell_diffusion.app.bases import Base
from snell_diffusion.errors import SnellaValueError

RARE_WORD = "sks"  # a word that text encoders know and hardly any caption uses
SHEETS = 5  # sample sheets after the first one, which shows the untrained base
HELD_OUT_FROM = 4  # photos from which one is held out


@dataclass(frozen=True)
class Kind:
    """What is learned.

    Attributes:
        id: Name in requests.
        label: Name on the page.
        hint: Which photos it wants.
        prompt: Sentence of a photo, with {word} and {subject}.
        captioned: The same for a photo whose surroundings {caption} names.
        class_prompt: The sentence that must stay as the base draws it.
        samples: Pictures that are drawn while it trains: as in the photos, elsewhere, then two
            without the word, which must not change.
        prior_loss_weight: How much the class is held; 0 only measures how far it drifts.
    """

    id: str
    label: str
    hint: str
    prompt: str
    captioned: str
    class_prompt: str
    samples: tuple[str, ...]
    prior_loss_weight: float = 1.0


@dataclass(frozen=True)
class Effort:
    """How long it trains; the steps depend on the base."""

    id: str
    label: str
    hint: str


_SUBJECT: dict[str, Any] = {
    "prompt": "a photo of a {word} {subject}",
    "captioned": "a photo of a {word} {subject} {caption}",
    "class_prompt": "a photo of a {subject}",
    "samples": (
        "a photo of a {word} {subject}",
        "a photo of a {word} {subject} in the snow",
        "a photo of a {subject} on the beach",
    ),
}
KINDS = {
    kind.id: kind
    for kind in (
        Kind(
            "pet",
            "A pet or a person",
            "5 to 15 photos, each in another place, light and pose, with the face free.",
            **_SUBJECT,
        ),
        Kind(
            "object",
            "An object",
            "4 to 10 photos from several sides, on different grounds, the whole object in view.",
            **_SUBJECT,
        ),
        Kind(
            "style",
            "A style",
            "10 to 30 pictures in the same style, each of something else.",
            prompt="a picture in {word} style",
            captioned="{caption} in {word} style",
            class_prompt="a toy on a white background",
            samples=(
                "a cat on a white background in {word} style",
                "a backpack in the snow in {word} style",
                "a cat on a white background",
            ),
            prior_loss_weight=0.0,
        ),
    )
}
EFFORTS = {
    effort.id: effort
    for effort in (
        Effort("quick", "Quick", "a first look; the likeness stays rough"),
        Effort("balanced", "Balanced", "the usual length"),
        Effort("thorough", "Thorough", "twice as long; more detail, and more risk of copying"),
    )
}


@dataclass(frozen=True)
class Recipe:
    """What a base wants.

    Attributes:
        steps: Optimizer steps by effort.
        learning_rate: By kind.
        new_word: Teach a new word rather than a rare one.
        values: Other settings.
        from_class: Let a new word start as the class word. Seen once, a backpack on embedded-dit:
            from a random start its shape falls apart, from "backpack" it keeps it.
    """

    steps: Mapping[str, int]
    learning_rate: Mapping[str, float]
    new_word: bool
    values: Mapping[str, Any]
    from_class: bool = False


_SHIPPED: dict[str, Any] = {
    "rank": 16,
    "update_scale": 10.0,
    "train_text_encoder": True,
    "token_learning_rate": 1e-2,
    "train_batch_size": 4,
    "lr_scheduler": "cosine",
    "validation_timesteps": 4,
    "num_inference_steps": 12,
}
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
RECIPES = {
    # recipe_pet.yaml, recipe_object.yaml and recipe_style.yaml
    "embedded": Recipe(
        {"quick": 45, "balanced": 90, "thorough": 180},
        {"pet": 1.2e-2, "object": 4e-3, "style": 8e-3},
        True,
        _SHIPPED,
    ),
    # demo_dit.yaml, with the word and the prior of the recipes
    "embedded-dit": Recipe(
        {"quick": 75, "balanced": 150, "thorough": 300},
        {"pet": 4e-3, "object": 4e-3, "style": 4e-3},
        True,
        {
            **_SHIPPED,
            # attention, and the picture's feed-forward and output layers
            "target_modules": [
                *_ATTENTION,
                "to_add_out",
                "ff.net.0.proj",
                "ff.net.2",
                "proj_out",
            ],
        },
        from_class=True,
    ),
}
_OTHER: dict[str, Any] = {
    "rank": 16,
    "target_sparsity": 0.5,
    "train_batch_size": 1,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 50,
}
_LARGE = 512  # pixels a side from which the memory of activations matters


def recipe_of(base: Base) -> Recipe:
    """The settings that fit a base.

    sd15.yaml, sdxl.yaml and their siblings: a larger learning rate for the UNets of Stable
    Diffusion than for transformers.
    """
    if base.id in RECIPES:
        return RECIPES[base.id]
    rate = 1e-3 if base.family in ("sd", "sdxl") else 5e-4
    values = dict(_OTHER)
    if base.resolution >= _LARGE:
        values |= {"gradient_checkpointing": True, "aspect_ratio_buckets": "auto"}
    if torch.cuda.is_available():
        values["mixed_precision"] = "bf16"
    return Recipe(
        {"quick": 300, "balanced": 800, "thorough": 1500}, dict.fromkeys(KINDS, rate), False, values
    )


def usual_word(base: Base, subject: str) -> str:
    """The word that comes to mean the subject, unless another is asked for.

    The shipped bases were trained to ignore rare words, so they get a new one; real bases have
    learned the rare word sks less thoroughly to ignore, and it needs no change of the tokenizer.

    Args:
        base: What is trained.
        subject: Class word: "red cat" gives <my-red-cat>.
    """
    if not recipe_of(base).new_word:
        return RARE_WORD
    return f"<my-{'-'.join(subject.lower().split())}>"


def preset_values(
    base: Base, kind: str, effort: str, photos: int, steps: int | None = None
) -> dict[str, Any]:
    """Training settings without words, photos, seed and places.

    Args:
        base: What is trained.
        kind: Of KINDS.
        effort: Of EFFORTS.
        photos: How many there are: with 4 or more the last is held out.
        steps: Optimizer steps in place of the effort's.

    Raises:
        SnellaValueError: No such kind or effort.
    """
    if kind not in KINDS or effort not in EFFORTS:
        raise SnellaValueError(
            f"the preset must be one of {', '.join(KINDS)} and one of {', '.join(EFFORTS)}"
        )
    recipe = recipe_of(base)
    steps = steps or recipe.steps[effort]
    every = max(1, -(-steps // SHEETS))
    return {
        "resolution": base.resolution,
        "with_prior_preservation": True,
        "prior_loss": "prediction",
        "prior_loss_weight": KINDS[kind].prior_loss_weight,
        "method": "snella",
        **recipe.values,
        "max_train_steps": steps,
        "learning_rate": recipe.learning_rate[kind],
        "num_validation_photos": 1 if photos >= HELD_OUT_FROM else 0,
        "guidance_scale": base.guidance,
        "num_inference_steps": recipe.values.get("num_inference_steps", base.steps),
        **dict.fromkeys(("validation_steps", "sample_steps", "checkpointing_steps"), every),
        "checkpoints_total_limit": 2,
    }
