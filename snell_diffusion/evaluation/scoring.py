"""Scores of a run's pictures, in the spaces that are at hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from snell_diffusion.evaluation.base import Base
from snell_diffusion.evaluation.metrics import (
    Clip,
    ImageFeatures,
    cosine_distance,
    diversity,
    likeness,
    obedience,
    root_mean_square,
)
from snell_diffusion.evaluation.pictures import Task

Scores = dict[str, dict[str, Any]]
_LATENTS = "VAE latents"


@dataclass
class Scorer:
    """Measures pictures against photos and prompts.

    Attributes:
        base: Whose latents serve where there is no DINO model.
        clip: Hub id or folder of a CLIP model; none: no CLIP-I and CLIP-T.
        dino: Hub id or folder of a DINO model; none: no DINO.
    """

    base: Base
    clip: str | None = None
    dino: str | None = None
    _photos: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @cached_property
    def _clip(self) -> Clip:
        return Clip(str(self.clip), self.base.device)

    @cached_property
    def _dino(self) -> ImageFeatures:
        return ImageFeatures(str(self.dino), "dino", self.base.device)

    def wanted(self, task: Task) -> dict[str, str]:
        """The scores that can be measured, and the space of each."""
        found = {}
        if self.clip:
            found |= {"clip_i": self.clip, "clip_t": self.clip}
        if self.dino:
            found["dino"] = self.dino
        if task.images.per_prompt > 1:
            found["diversity"] = self.dino or _LATENTS
        return found

    def missing(self, task: Task, known: Scores) -> list[str]:
        """Scores that were not measured yet in the space they would be measured in now.

        Diversity that was measured with a DINO model is not measured again without one.
        """
        names = []
        for name, space in self.wanted(task).items():
            found = known.get(name, {}).get("space")
            if found is None or (found != space and space != _LATENTS):
                names.append(name)
        return names

    def measure(
        self,
        names: Sequence[str],
        task: Task,
        pictures: Sequence[Image.Image],
        photos: Sequence[Image.Image],
        subject: str,
    ) -> Scores:
        """Scores of a run's pictures.

        Args:
            names: Which, of those that `missing` lists.
            task: Prompts of the pictures.
            pictures: In the order of `task.places`.
            photos: All photos of the subject.
            subject: Its name; features of its photos are kept under it.
        """
        values: dict[str, float] = {}
        if {"clip_i", "clip_t"} & set(names):
            features = self._clip(pictures)
            prompts = self._clip.text([task.plain[p] for p, _ in task.places])
            values["clip_i"] = likeness(features, self._of_photos(self._clip, photos, subject))
            values["clip_t"] = obedience(features, prompts)
        groups = [p for p, _ in task.places]
        if {"dino", "diversity"} & set(names) and self.dino:
            features = self._dino(pictures)
            values["dino"] = likeness(features, self._of_photos(self._dino, photos, subject))
            if "diversity" in names:
                values["diversity"] = diversity(features, groups, cosine_distance)
        elif "diversity" in names:
            latents = self.base.encode_pictures(pictures)
            values["diversity"] = diversity(latents, groups, root_mean_square)
        spaces = self.wanted(task)
        return {name: {"value": values[name], "space": spaces[name]} for name in names}

    def _of_photos(
        self, model: ImageFeatures, photos: Sequence[Image.Image], subject: str
    ) -> Tensor:
        key = (model.kind, subject)
        if key not in self._photos:
            self._photos[key] = model(photos)
        return self._photos[key]
