"""What is worth a look about a run's photos: doubles, near doubles, photos that get blown up."""

from collections.abc import Sequence

import numpy as np

from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.framing import Size, enlargement, nearest

_ALIKE = 4.0  # of 255: another size or compression of a photo stays below, another photo above


def duplicates(photos: Sequence[Photo]) -> list[str]:
    """Names of photos whose bytes equal an earlier one's."""
    first: dict[str, Photo] = {}
    return [p.path.name for p in photos if first.setdefault(p.digest, p) is not p]


def near_duplicates(photos: Sequence[Photo]) -> list[tuple[str, str]]:
    """Pairs of photos with other bytes that look the same: saved again, or at another size.

    Compared are thumbnails: a pair's mean difference is below 4 of 255 levels.
    """
    if not photos:
        return []
    looks = np.stack([np.frombuffer(p.thumbnail, np.uint8) for p in photos]).astype(np.int16)
    pairs = []
    for later in range(1, len(photos)):
        differences = np.abs(looks[:later] - looks[later]).mean(1)
        earlier = int(differences.argmin())
        same_bytes = photos[earlier].digest == photos[later].digest
        if differences[earlier] < _ALIKE and not same_bytes:
            pairs.append((photos[earlier].path.name, photos[later].path.name))
    return pairs


def enlarged(photos: Sequence[Photo], shapes: Sequence[Size]) -> list[str]:
    """Photos smaller than what is trained on, each with the factor it is blown up by."""
    factors = [(p, enlargement(p.size, nearest(p.size, shapes))) for p in photos]
    return [
        f"{photo.path.name} ({photo.size[1]}x{photo.size[0]}) {factor:.2f} times"
        for photo, factor in factors
        if factor > 1
    ]
