"""The photos of a run, checked before anything else happens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from snell_diffusion.diffusion.concepts import ConceptConfig
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo, Search, data_digest, find_photos
from snell_diffusion.diffusion.framing import Size, View, nearest
from snell_diffusion.diffusion.likeness import duplicates, enlarged, near_duplicates
from snell_diffusion.diffusion.pixels import read_mask_pixels
from snell_diffusion.diffusion.prior import class_images
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.errors import SnellaConfigError, shown


@dataclass(frozen=True)
class Photos:
    """The checked photos of a run, concept after concept.

    Attributes:
        instance: Photos to train on.
        held_out: Photos to measure on.
        given_class: Class images that are there already.
        unused_masks: Masks that are there though masked_loss is off.
    """

    instance: list[Photo]
    held_out: list[Photo]
    given_class: list[Photo]
    unused_masks: int = 0

    @classmethod
    def find(cls, config: TrainConfig, folder: RunFolder) -> "Photos":
        """Check every photo and split off the held-out ones.

        Raises:
            SnellaConfigError: Bad photos, too few to hold any out, or no mask to mask with.
        """
        instance: list[Photo] = []
        held_out: list[Photo] = []
        for number, concept in enumerate(config.subjects):
            mine = {"concept": number, **_role(concept)}
            for whole, part in zip(_split(config, concept), (instance, held_out), strict=True):
                part += [replace(_told(photo, concept, config), **mine) for photo in whole]
        masks = sum(photo.mask is not None for photo in (*instance, *held_out))
        if not config.masked_loss:
            instance = [replace(photo, mask=None) for photo in instance]
            held_out = [replace(photo, mask=None) for photo in held_out]
        elif not masks:
            raise SnellaConfigError(
                f"masked_loss is on, but no photo has a mask; put {instance[0].path.stem}.mask.png "
                f"beside '{instance[0].path}'"
            )
        given = [photo for images in class_images(config, folder) for photo in images.given()]
        return cls(instance, held_out, given, 0 if config.masked_loss else masks)

    def stand_ins(self, config: TrainConfig) -> list[Photo]:
        """Class images for a trial step: those that are there, or photos in place of them."""
        if not config.uses_class_images:
            return []
        return self.given_class or [replace(p, prompt=p.prior_prompt) for p in self.instance]

    def drift_photos(self, images: Sequence[Photo], config: TrainConfig, count: int) -> list[Photo]:
        """Pictures with class prompts, taken from all concepts in turn, to measure drift on.

        Args:
            images: Class images of the run.
            config: Says whether there is a prior.
            count: How many at most.
        """
        if config.with_prior_preservation and not config.uses_class_images:
            images = [replace(p, prompt=p.prior_prompt, mask=None) for p in self.instance]
        turns: Counter[int] = Counter()
        ranked = []
        for photo in images:
            ranked.append((turns[photo.concept], photo.concept, photo))
            turns[photo.concept] += 1
        return [photo for *_, photo in sorted(ranked, key=lambda entry: entry[:2])][:count]

    def digest(self) -> str:
        """What a resumed run must find again: file contents and prompts."""
        return data_digest([*self.instance, *self.held_out])

    def summary(self, config: TrainConfig, shapes: Sequence[Size]) -> list[str]:
        """Lines for the user: how many photos, what is odd about them, what is missing.

        Args:
            config: The run.
            shapes: Shapes to train on, see `framing.shapes`.
        """
        everything = [*self.instance, *self.held_out]
        lines = [f"photos: {len(self.instance)} to train on, {len(self.held_out)} held out"]
        lines += self._concept_lines(config)
        lines += self._use_lines(shapes)
        lines += self._unseen_lines(config, shapes)
        twins = duplicates(everything)
        if twins:
            lines.append(f"photos that equal an earlier one: {', '.join(twins)}")
        alike = [f"{later} (like {earlier})" for earlier, later in near_duplicates(everything)]
        if alike:
            lines.append(f"photos that look like an earlier one: {shown(alike)}")
        small = enlarged(everything, shapes)
        if small:
            lines.append(f"photos smaller than they are trained at, blown up: {shown(small)}")
        if config.uses_class_images:
            wanted = sum(c.num_class_images or 0 for c in config.subjects if c.class_prompt)
            missing = max(0, wanted - len(self.given_class))
            lines.append(f"class images: {len(self.given_class)} there, {missing} to generate")
        return lines

    def _concept_lines(self, config: TrainConfig) -> list[str]:
        """What each of several concepts has."""
        if not config.concepts:
            return []
        lines = []
        for number, concept in enumerate(config.subjects):
            count = sum(photo.concept == number for photo in self.instance)
            prior = f"class '{concept.class_prompt}'" if concept.class_prompt else "no class prompt"
            lines.append(
                f"concept {concept.name}: {count} photos of '{concept.instance_prompt}', each "
                f"{concept.repeats} times an epoch, weight {concept.weight:g}, {prior}"
            )
        return lines

    def _use_lines(self, shapes: Sequence[Size]) -> list[str]:
        """Captions, masks and shapes, where there are any."""
        lines, count = [], len(self.instance)
        captions = sum(photo.captioned for photo in self.instance)
        if captions:
            lines.append(f"captions: {captions} of {count} photos have their own")
        masks = sum(photo.mask is not None for photo in self.instance)
        if masks:
            lines.append(f"masks: {masks} of {count} photos have one, of the others all counts")
        if self.unused_masks:
            lines.append(f"masks: {self.unused_masks} are there, and masked_loss is off")
        if len(shapes) > 1:
            found = Counter(nearest(photo.size, shapes) for photo in self.instance)
            named = [f"{width}x{height} for {n}" for (height, width), n in sorted(found.items())]
            lines.append(f"shapes in pixels (width x height) and photos: {', '.join(named)}")
        return lines

    def _unseen_lines(self, config: TrainConfig, shapes: Sequence[Size]) -> list[str]:
        """Photos of which nothing counts, since all that is white in their mask is cut off."""
        if config.unmasked_weight or not config.center_crop:
            return []
        unseen = [
            photo.path.name
            for photo in (*self.instance, *self.held_out)
            if photo.mask and not read_mask_pixels(photo, nearest(photo.size, shapes), View()).any()
        ]
        if not unseen:
            return []
        return [
            f"photos that teach nothing, for the cut leaves only black of their mask and "
            f"unmasked_weight is 0: {shown(unseen)}; crop them by hand around the subject"
        ]


def _split(config: TrainConfig, concept: ConceptConfig) -> tuple[list[Photo], list[Photo]]:
    """A concept's photos to train on, and those held out."""
    search = Search(config.use_captions, config.caption_column, config.recursive)
    instance = find_photos(concept.instance_data_dir, concept.instance_prompt, search)
    if concept.validation_data_dir is not None:
        held_out = find_photos(concept.validation_data_dir, concept.instance_prompt, search)
        return instance, held_out
    count = len(instance) - (concept.num_validation_photos or 0)
    if count < 1:
        raise SnellaConfigError(
            f"num_validation_photos is {concept.num_validation_photos}, but "
            f"'{concept.instance_data_dir}' holds {len(instance)} photos; at least one must "
            f"be left to train on"
        )
    return instance[:count], instance[count:]


def _role(concept: ConceptConfig) -> dict[str, object]:
    return {
        "prior_prompt": concept.class_prompt or "",
        "repeats": concept.repeats,
        "weight": concept.weight,
    }


def _told(photo: Photo, concept: ConceptConfig, config: TrainConfig) -> Photo:
    """A photo without caption gets the templates, filled in; the first where nothing is drawn."""
    if photo.captioned or not config.caption_templates:
        return photo
    filled = tuple(t.replace("{}", concept.instance_prompt) for t in config.caption_templates)
    return replace(photo, prompt=filled[0], templates=filled)
