"""Models that ship inside the package: folders that diffusers loads without a network."""

from pathlib import Path

__all__ = ["embedded_path"]


def embedded_path(name: str = "embedded") -> Path:
    """Folder of a model that ships with the package, for `from_pretrained`.

    Args:
        name: Folder name; "embedded" is the tiny text-to-image model.

    Raises:
        ValueError: No such model; the message lists the valid names.
    """
    root = Path(__file__).parent
    names = sorted(p.parent.name for p in root.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"embedded model {name!r} is unknown; known: {', '.join(names)}")
    return root / name
