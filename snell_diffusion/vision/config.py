"""Every setting of a classification run in one flat record, checked on creation.

The settings themselves are in config_groups.py, those of the images in data/settings.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from snell_diffusion.training.config_files import Settings, yaml_text
from snell_diffusion.training.config_types import FROZEN, named_pairs, named_values, pairs
from snell_diffusion.vision.config_groups import BaseModel, Method, Optimization, Run
from snell_diffusion.vision.data.settings import Data

PROTOCOLS: dict[str, dict[str, Any]] = {
    "validation": {
        "num_train_epochs": 50,
        "lr_update": "step",
        "warmup_lr": 0.0,
        "min_lr": 0.0,
        "adam_epsilon": 1e-15,
        "max_grad_norm": 1.0,
        "allocate": "step",
        "drop_path": 0.0,
        "backbone_drop_path": 0.0,
        "train_cls_token": False,
    },
    "paper": {
        "num_train_epochs": 100,
        "lr_update": "epoch",
        "warmup_epochs": 10.0,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 0.0,
        "allocate": "epoch",
        "dropout": 0.1,
        "drop_path": 0.1,
        "backbone_drop_path": 0.1,
        "train_cls_token": True,
    },
}
"""What stands where a setting was not given; "paper" are the published scripts' (SNELLA)."""


@dataclass(**FROZEN)
class VisionConfig(Run, Optimization, Method, Data, BaseModel):
    """All settings of one run as one flat, frozen, validated record."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Settings that were not given take the protocol's value, so that a record is complete."""
        values = dict((given.kwargs if isinstance(given, ArgsKwargs) else given) or {})
        for name, value in PROTOCOLS.get(values.get("protocol", "validation"), {}).items():
            if values.get(name) is None:
                values[name] = value
        if values.get("warmup_epochs") is None and isinstance(values.get("num_train_epochs"), int):
            values["warmup_epochs"] = values["num_train_epochs"] / 10
        return ArgsKwargs((), values)

    @field_validator("optimizer_args", "method_args", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return pairs(value)

    @field_validator("optimizer_args", "method_args")
    @classmethod
    def _named(cls, value: list[str]) -> list[str]:
        names = [pair.partition("=")[0] for pair in named_pairs(value)]
        if len(set(names)) != len(names):
            raise ValueError("should name each setting once")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "VisionConfig":
        taken = {"rank", "update_scale", "dropout"} & self.method_settings.keys()
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))} stand on their own, not in method_args")
        if self.select_on == "test" and self.protocol != "paper":
            raise ValueError(
                "select_on test chooses epochs on the images that the result is measured on: it "
                "needs protocol paper, which says that this is meant"
            )
        if self.output_dir is None and (self.checkpointing_epochs or self.resume_from_checkpoint):
            raise ValueError("checkpoints need output_dir")
        if self.levels and self.output_dir is None and self.resume_from_checkpoint:
            raise ValueError("levels cannot be resumed without output_dir")
        if len(set(self.levels)) != len(self.levels):
            raise ValueError("levels should name each level once")
        return self

    @property
    def method_settings(self) -> dict[str, Any]:
        """`method_args` by name."""
        return named_values(self.method_args)


SETTINGS = Settings(
    VisionConfig,
    "Fine-tune a vision model for image classification, with SNELLA or another method.",
)


def parse_config(arguments: Sequence[str]) -> VisionConfig:
    """Build the config from command-line arguments and the YAML file that --config names.

    Raises:
        SnellaConfigError: Unknown key or flag (the nearest is named), bad value, unreadable file.
    """
    return SETTINGS.parse(arguments)


def make_config(values: Mapping[str, Any], where: str = "config") -> VisionConfig:
    """Build a VisionConfig from plain values; `where` names their source in error messages.

    Raises:
        SnellaConfigError: Unknown keys or bad values, all of them in one message.
    """
    return SETTINGS.make(values, where)


def config_values(config: VisionConfig) -> dict[str, Any]:
    """The config as plain values, every key resolved."""
    return {name: getattr(config, name) for name in SETTINGS.keys}


def config_text(config: VisionConfig) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    return yaml_text(config_values(config))
