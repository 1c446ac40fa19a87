"""Every setting of a DreamBooth run in one flat record, checked on creation.

The settings themselves, by topic, are in config_groups.py.
"""

import re
from dataclasses import replace
from typing import Any

from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass

from snell_diffusion.adapters import limits
from snell_diffusion.diffusion.concepts import OWN, OWN_HELD_OUT, ConceptConfig, named
from snell_diffusion.diffusion.config_groups import (
    LARGEST_SIDE,
    SMALLEST_SIDE,
    BaseModel,
    Data,
    Feedback,
    Method,
    Optimization,
    Prior,
    Run,
)
from snell_diffusion.training.config_types import FROZEN, named_pairs, pairs


@dataclass(**FROZEN)
class TrainConfig(Run, Feedback, Optimization, Method, Prior, Data, BaseModel):
    """All settings of one run as one flat, frozen, validated record."""

    @field_validator("optimizer_args", "method_args", "new_tokens", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return pairs(value)

    @field_validator("optimizer_args", "method_args")
    @classmethod
    def _named(cls, value: list[str]) -> list[str]:
        return named_pairs(value)

    @field_validator("new_tokens")
    @classmethod
    def _words(cls, value: list[str]) -> list[str]:
        texts = [entry.partition("=")[0] for entry in value]
        for entry, text in zip(value, texts, strict=True):
            vectors = entry[len(text) :]
            if not limits.WORD.fullmatch(text) or not re.fullmatch(r"(=[1-9][0-9]?)?", vectors):
                raise ValueError(
                    f"should be words in brackets, such as <cup>, or <cup>=2 for two embeddings; "
                    f"'{entry}' is none"
                )
            if int(vectors[1:] or 1) > limits.MAX_VECTORS:
                raise ValueError(f"should have at most {limits.MAX_VECTORS} embeddings per word")
        if len(set(texts)) != len(texts) or len(texts) > limits.MAX_WORDS:
            raise ValueError(f"should name each word once, {limits.MAX_WORDS} words at most")
        return value

    @field_validator("aspect_ratio_buckets", mode="before")
    @classmethod
    def _shapes(cls, value: Any) -> Any:
        if str(value).lower() in ("true", "false"):  # of YAML, or a text of the command line
            return "auto" if str(value).lower() == "true" else None
        if isinstance(value, list):
            return ";".join(",".join(map(str, pair)) for pair in value)
        return value

    @field_validator("aspect_ratio_buckets")
    @classmethod
    def _pairs_of_sides(cls, value: str | None) -> str | None:
        pair = r"[1-9]\d*,[1-9]\d*"
        if value is None or value == "auto":
            return value
        if re.fullmatch(f"{pair}(;{pair})*", value):
            sides = [int(side) for side in re.findall(r"\d+", value)]
            if not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in sides):
                raise ValueError(f"should have sides of {SMALLEST_SIDE} to {LARGEST_SIDE} pixels")
            return value
        raise ValueError("should be auto or height,width;height,width, for example 512,768;768,512")

    @field_validator("caption_templates")
    @classmethod
    def _one_gap(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(
                    f"should hold {{}} once, as in 'a photo of {{}}', got '{template}'"
                )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        self._require_subject()
        self._require_prior()
        self._require_partners()
        if self.cache_latents and not self.center_crop:
            raise ValueError("random crops (center_crop off) need cache_latents off")
        if self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8 pixels, got {self.resolution}")
        return self

    def _require_subject(self) -> None:
        if self.concepts:
            named(self.concepts)
            given = [key for key in (*OWN, OWN_HELD_OUT) if getattr(self, key) is not None]
            if given:
                raise ValueError(
                    f"with concepts, {', '.join(given)} must stand in each of them, not beside them"
                )
            return
        if self.instance_data_dir is None:
            raise ValueError("instance_data_dir is missing: give the folder with the photos")
        if self.instance_prompt is None:
            raise ValueError("instance_prompt is missing, for example 'a photo of a sks dog'")
        if self.validation_data_dir is not None and self.num_validation_photos:
            raise ValueError("give validation_data_dir or num_validation_photos, not both")

    def _require_partners(self) -> None:
        """Settings that mean nothing without another one."""
        held_out = any(c.validation_data_dir or c.num_validation_photos for c in self.subjects)
        if self.early_stopping_patience is not None and not (self.validation_steps and held_out):
            raise ValueError(
                "early_stopping_patience needs validation_steps and held-out photos "
                "(num_validation_photos or validation_data_dir)"
            )
        if self.bucket_step is not None:
            if self.aspect_ratio_buckets != "auto":
                raise ValueError("bucket_step has no effect without aspect_ratio_buckets auto")
            if self.bucket_step > self.resolution:
                raise ValueError(
                    f"bucket_step must be at most resolution, {self.resolution}, or every shape "
                    f"would be larger; got {self.bucket_step}"
                )
        if self.initializer_token is not None and not self.new_tokens:
            raise ValueError("initializer_token is what new_tokens start as: give new_tokens too")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError("hub_model_id has no effect without push_to_hub")

    def _require_prior(self) -> None:
        if self.prior_loss == "prediction":
            if not self.with_prior_preservation:
                raise ValueError("prior_loss prediction needs with_prior_preservation")
            if self.class_batch_size is not None:
                raise ValueError(
                    "class_batch_size is for class images; with prior_loss prediction every photo "
                    "of a batch is used: leave it out"
                )
        elif self.with_prior_preservation and not any(c.class_prompt for c in self.subjects):
            raise ValueError("with_prior_preservation needs class_prompt, the prompt without token")

    @property
    def subjects(self) -> list[ConceptConfig]:
        """The concepts, nothing left to default; one without name from the plain settings."""
        plain = ConceptConfig(
            instance_data_dir=self.instance_data_dir or "",
            instance_prompt=self.instance_prompt or "",
            class_data_dir=self.class_data_dir,
            class_prompt=self.class_prompt,
            validation_data_dir=self.validation_data_dir,
        )
        return [
            replace(
                concept,
                num_class_images=concept.num_class_images or self.num_class_images,
                num_validation_photos=self._held_out_of(concept),
            )
            for concept in (named(self.concepts) or [plain])
        ]

    def _held_out_of(self, concept: ConceptConfig) -> int:
        if concept.validation_data_dir is not None:
            return 0
        own = concept.num_validation_photos
        return self.num_validation_photos if own is None else own

    @property
    def uses_class_images(self) -> bool:
        """Whether class images are generated and trained on."""
        return self.with_prior_preservation and self.prior_loss == "images"

    @property
    def prompts(self) -> list[str]:
        """Prompts of the sample sheet, in order."""
        first = [] if self.validation_prompt is None else [self.validation_prompt]
        return first + self.sample_prompts
