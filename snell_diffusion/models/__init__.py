"""Models that ship inside the package: folders that load without a network."""

from pathlib import Path

__all__ = [
    "SHIPPED_BASES",
    "VISION_BASES",
    "embedded_dit_path",
    "embedded_path",
    "embedded_vit_path",
]

SHIPPED_BASES = {  # text-to-image: name in a config -> folder beside this file
    "embedded": "embedded",  # a UNet for StableDiffusionPipeline
    "embedded-dit": "embedded_dit",  # a transformer for StableDiffusion3Pipeline
}
VISION_BASES = {  # image classification: name in a config -> folder beside this file
    "embedded-vit": "embedded_vit",  # for transformers.ViTForImageClassification
}


def embedded_path(name: str = "embedded") -> Path:
    """Folder of a model that ships with the package, for `from_pretrained`.

    Args:
        name: "embedded" is the tiny text-to-image model, "embedded-dit" its flow-matching sibling,
            "embedded-vit" the tiny image classifier.

    Raises:
        ValueError: No such model; the message lists the valid names.
    """
    folders = {**SHIPPED_BASES, **VISION_BASES}
    if name not in folders:
        raise ValueError(f"embedded model {name!r} is unknown; known: {', '.join(folders)}")
    return Path(__file__).parent / folders[name]


def embedded_dit_path() -> Path:
    """Folder of the tiny flow-matching transformer, for StableDiffusion3Pipeline."""
    return embedded_path("embedded-dit")


def embedded_vit_path() -> Path:
    """Folder of the tiny image classifier, for transformers.ViTForImageClassification."""
    return embedded_path("embedded-vit")
