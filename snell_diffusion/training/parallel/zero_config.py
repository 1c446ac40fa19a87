"""What the launcher asks of DeepSpeed: the ZeRO stage and its tuning; the rest is refused by name.

accelerate hands this over in environment variables, or in a DeepSpeed JSON file that one of them
names. The run's own config says batch, accumulation, clipping, precision and optimizer, so a second
place that sets them is an error and not a silent override.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snell_diffusion.errors import SnellaConfigError

STAGES = (1, 2, 3)
_DEFAULT_STAGE = 2  # accelerate's

ENTRYWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""Optimizers that treat every entry by itself, so that slices step as whole matrices would."""

_TUNING = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save",  # in accelerate's templates; nothing reads it here
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
}
_OURS = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
}
"""DeepSpeed's sections that the run's config decides, and the setting to use in their place."""

_HARMLESS = {"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"}
_OFF = ("auto", "none", None, False)


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed is to do.

    Attributes:
        stage: 1, 2 or 3.
        tuning: Sizes of buckets and the like, as in DeepSpeed's `zero_optimization`.
    """

    stage: int
    tuning: Mapping[str, Any]

    def deepspeed_config(self, largest: int) -> dict[str, Any]:
        """The whole configuration of an engine.

        Args:
            largest: Numbers in the largest trainable tensor. Stage 3 keeps tensors up to this size
                whole on every process: all adapter tensors, and what is as small in the base.
        """
        threshold = "stage3_param_persistence_threshold"
        tuning = {key: value for key, value in self.tuning.items() if value != "auto"}
        return {
            # The loop accumulates and averages over the batch; DeepSpeed only needs to hear of 1.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                **tuning,
                "stage": self.stage,
                threshold: max(largest, int(tuning.get(threshold, 0))),
            },
        }


def read_settings(environment: Mapping[str, str] = os.environ) -> ZeroSettings:
    """The stage and tuning that the launcher's environment asks for.

    Raises:
        SnellaConfigError: It asks for something that this trainer does itself or that would not
            work; names the variable or the key and what to set instead.
    """
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() not in ("", "none"):
        return _checked(_read(Path(path)), path)
    for kind in ("OPTIMIZER", "PARAM"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE"
        device = environment.get(variable, "none")
        if device != "none":
            raise _refused(f"{variable}={device}", _OFFLOAD)
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    given = {
        "zero_optimization": {"stage": environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")},
        "gradient_clipping": None if clipping == "none" else clipping,
        "gradient_accumulation_steps": None if steps == "1" else steps,
    }
    return _checked(given, "the accelerate config")


def require_entrywise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that gives another result on slices of matrices.

    Raises:
        SnellaConfigError: Names it and those that work.
    """
    if type(optimizer) not in ENTRYWISE:
        known = ", ".join(cls.__name__ for cls in ENTRYWISE)
        raise SnellaConfigError(
            f"DeepSpeed: optimizer {type(optimizer).__name__} cannot be cut into slices; use one "
            f"of {known}, or launch without DeepSpeed"
        )


_OFFLOAD = (
    "offload is not supported: leave it out, and use stage 3 to divide the base between the "
    "processes or --gradient_checkpointing to save memory"
)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SnellaConfigError(
            f"the DeepSpeed config {path} cannot be read as JSON: {error}"
        ) from error
    if not isinstance(found, dict):
        raise SnellaConfigError(f"the DeepSpeed config {path} must be a JSON object")
    return found


def _checked(given: Mapping[str, Any], source: str) -> ZeroSettings:
    for key, value in given.items():
        if key in _OURS and not _is_off(value):
            raise _refused(f"{key} in {source}", f"set {_OURS[key]} in the run's config instead")
        if key not in {"zero_optimization", *_OURS, *_HARMLESS}:
            known = ", ".join(sorted(_HARMLESS))
            raise _refused(f"{key} in {source}", f"known are zero_optimization and {known}")
    section = given.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise SnellaConfigError(f"zero_optimization in {source} must be a JSON object")
    return ZeroSettings(_stage(section.get("stage"), source), _tuning(section, source))


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled", True) in _OFF
    return value in _OFF


def _stage(value: Any, source: str) -> int:
    try:
        stage = _DEFAULT_STAGE if value is None else int(value)
    except (TypeError, ValueError):
        stage = -1
    if stage not in STAGES:
        raise SnellaConfigError(
            f"the ZeRO stage in {source} must be 1, 2 or 3, got {value!r}; for stage 0 launch "
            f"without DeepSpeed"
        )
    return stage


def _tuning(section: Mapping[str, Any], source: str) -> dict[str, Any]:
    for key, value in section.items():
        offloads = key.startswith("offload_") and isinstance(value, dict)
        if key == "stage" or (offloads and value.get("device") in _OFF):
            continue
        if key not in _TUNING:
            advice = _OFFLOAD if offloads else f"known are {', '.join(sorted(_TUNING))}"
            raise _refused(f"zero_optimization.{key} in {source}", advice)
    return {key: value for key, value in section.items() if key in _TUNING}


def _refused(what: str, advice: str) -> SnellaConfigError:
    return SnellaConfigError(f"DeepSpeed: {what} cannot be used here; {advice}")
