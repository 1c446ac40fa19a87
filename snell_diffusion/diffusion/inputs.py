"""The photos of a run, checked before anything else happens."""

from dataclasses import dataclass, replace

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo, data_digest, duplicates, find_photos
from snell_diffusion.diffusion.prior import given_images
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.errors import SnellaConfigError


@dataclass(frozen=True)
class Photos:
    """The checked photos of a run."""

    instance: list[Photo]
    held_out: list[Photo]
    given_class: list[Photo]

    @classmethod
    def find(cls, config: TrainConfig, folder: RunFolder) -> "Photos":
        """Check every photo and split off the held-out ones.

        Raises:
            SnellaConfigError: Bad photos, or too few to hold any out.
        """
        prompt = str(config.instance_prompt)
        instance = find_photos(str(config.instance_data_dir), prompt, config.use_captions)
        held_out: list[Photo] = []
        if config.validation_data_dir is not None:
            held_out = find_photos(config.validation_data_dir, prompt, config.use_captions)
        elif config.num_validation_photos:
            count = len(instance) - config.num_validation_photos
            if count < 1:
                raise SnellaConfigError(
                    f"num_validation_photos is {config.num_validation_photos}, but "
                    f"'{config.instance_data_dir}' holds {len(instance)} photos; at least one must "
                    f"be left to train on"
                )
            instance, held_out = instance[:count], instance[count:]
        given = []
        if config.with_prior_preservation:
            given = given_images(folder.class_images, str(config.class_prompt))
        return cls(instance, held_out, given)

    @staticmethod
    def class_photos(images: list[Photo], config: TrainConfig) -> list[Photo]:
        """Up to num_class_images images with the class prompt; none without prior preservation."""
        if not config.with_prior_preservation:
            return []
        prompt = str(config.class_prompt)
        return [replace(image, prompt=prompt) for image in images[: config.num_class_images]]

    def digest(self) -> str:
        """What a resumed run must find again: file contents and prompts."""
        return data_digest([*self.instance, *self.held_out])

    def summary(self, config: TrainConfig) -> list[str]:
        """Lines for the user: how many photos, and which are doubles."""
        lines = [f"photos: {len(self.instance)} to train on, {len(self.held_out)} held out"]
        twins = duplicates([*self.instance, *self.held_out])
        if twins:
            lines.append(f"photos that equal an earlier one: {', '.join(twins)}")
        if config.with_prior_preservation:
            missing = max(0, config.num_class_images - len(self.given_class))
            lines.append(f"class images: {len(self.given_class)} there, {missing} to generate")
        return lines
