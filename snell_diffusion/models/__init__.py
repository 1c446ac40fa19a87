"""Models that ship inside the package: folders that diffusers loads without a network."""

from pathlib import Path

__all__ = ["SHIPPED_BASES", "embedded_dit_path", "embedded_path"]

SHIPPED_BASES = {  # name in a config -> folder beside this file
    "embedded": "embedded",  # a UNet for StableDiffusionPipeline
    "embedded-dit": "embedded_dit",  # a transformer for StableDiffusion3Pipeline
}


def embedded_path(name: str = "embedded") -> Path:
    """Folder of a model that ships with the package, for `from_pretrained`.

    Args:
        name: "embedded" is the tiny text-to-image model, "embedded-dit" its flow-matching sibling.

    Raises:
        ValueError: No such model; the message lists the valid names.
    """
    if name not in SHIPPED_BASES:
        raise ValueError(f"embedded model {name!r} is unknown; known: {', '.join(SHIPPED_BASES)}")
    return Path(__file__).parent / SHIPPED_BASES[name]


def embedded_dit_path() -> Path:
    """Folder of the tiny flow-matching transformer, for StableDiffusion3Pipeline."""
    return embedded_path("embedded-dit")
