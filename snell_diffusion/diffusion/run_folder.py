"""The folder of one run: what it holds, when it may be written to, and what a resume must match."""

from pathlib import Path
from typing import Any

from snell_diffusion.adapters.export_tokens import EMBEDS_GLOB, EMBEDS_NAME
from snell_diffusion.diffusion.concepts import ConceptConfig
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_values
from snell_diffusion.diffusion.config_groups import Feedback
from snell_diffusion.training import run_folder
from snell_diffusion.training.checkpoints import Checkpoint
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.tuners.recipes import recipe

CLASS_IMAGES = "class_images"
LORA_LIKE = ("lora", "dora")
"""Methods whose adapters diffusers' own `load_lora_weights` reads."""
ADAPTER_FILES = {
    "ours": "pytorch_snella_weights.safetensors",
    "lora": "pytorch_lora_weights.safetensors",
    "peft": "pytorch_peft_weights.safetensors",
    "full": "pytorch_full_weights.safetensors",
}
"""What a run leaves: an adapter of ours, one that diffusers loads as a LoRA, another of PEFT's, or
the whole trained models. `diffusion.restore` puts any of them into a pipeline."""
FILES = (
    "config.yaml",
    "log.jsonl",
    "status.json",
    "loss.png",
    "allocation.png",
    "samples.png",
    "README.md",
    EMBEDS_NAME,
    *ADAPTER_FILES.values(),
)
FOLDERS = ("samples", "checkpoints", CLASS_IMAGES, "logs")

# Settings that a resumed run may change: they change nothing that is trained. Photos, class images
# and the base are compared by content, wherever they lie.
_JUDGE = frozenset({"early_stopping_patience", "early_stopping_min_delta"})
FREE = frozenset(Feedback.__dataclass_fields__) - {"num_validation_photos"} - _JUDGE | {
    "checkpointing_steps",
    "checkpoints_total_limit",
    "cache_dir",
    "class_data_dir",
    "dataloader_num_workers",
    "dry_run",
    "instance_data_dir",
    "offload_encoders",
    "output_dir",
    "overwrite",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "pretrained_model_name_or_path",
    "resume_from_checkpoint",
    "revision",
    "sample_batch_size",
    "variant",
}
_MEASURED = frozenset({"validation_steps", "validation_timesteps"})
# What concepts and their folders are called; photos and prompts are compared by content.
_NAMES = frozenset({"name", "instance_prompt"})
# Settings that count through their product with the number of processes.
PER_PROCESS = frozenset({"train_batch_size", "class_batch_size"})


def kind_of(method: str) -> str:
    """Which of ADAPTER_FILES a method's run leaves."""
    found = recipe(method)
    if found.ours:
        return "ours"
    if found.trains_base:
        return "full"
    return "lora" if method in LORA_LIKE else "peft"


class RunFolder(run_folder.RunFolder):
    """Files of a run below `output_dir`.

    Args:
        config: Names the folder and says whether an earlier run may be replaced or resumed.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(
            Path(config.output_dir),
            FILES,
            FOLDERS,
            overwrite=config.overwrite,
            resume=config.resume_from_checkpoint,
            limit=config.checkpoints_total_limit,
        )
        self.config = config

    @property
    def adapter_file(self) -> str:
        return ADAPTER_FILES[kind_of(self.config.method)]

    def class_images(self, concept: ConceptConfig) -> Path:
        """Where the class images of a concept are."""
        if concept.class_data_dir is not None:
            return Path(concept.class_data_dir)
        return self.path / CLASS_IMAGES / (concept.name or "")

    def written(self) -> list[str]:
        """Class images stay: they cost time, and their note says whether they still fit."""
        words = [path.name for path in self.path.glob(EMBEDS_GLOB)]
        return [*words, *(name for name in super().written() if name != CLASS_IMAGES)]


def identity(config: TrainConfig, data: str, base: str, processes: int) -> dict[str, Any]:
    """What must be equal for a run to continue another, as plain JSON values.

    Args:
        config: Settings; those in FREE are left out, those in PER_PROCESS become global batches.
        data: Digest of photos and prompts.
        base: Digest of the base model.
        processes: Processes that share a batch.
    """
    # Where measurements decide which adapter is kept, they must go on as they began.
    judged = _MEASURED if config.early_stopping_patience else frozenset()
    free = FREE - judged | PER_PROCESS
    settings = {k: v for k, v in config_values(config).items() if k not in free}
    settings["concepts"] = [
        {k: v for k, v in concept.items() if k not in FREE | _NAMES}
        for concept in settings["concepts"]
    ]
    batches = {"global_batch_size": config.train_batch_size * processes}
    if config.with_prior_preservation:
        one = config.class_batch_size or config.train_batch_size
        batches["global_class_batch_size"] = one * processes
    if config.dropout:
        # Dropout is drawn anew by every process; all else is drawn by place in the global batch.
        batches["processes"] = processes
    return {**settings, **batches, "photos": data, "base": base}


def require_same(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings, or from a state that lacks its class images.

    Raises:
        CheckpointError: Lists every difference, field by field.
    """
    if not isinstance(checkpoint.state.get("class_images", 0), (str, type(None))):
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: state.json does not say which run it belongs to"
        )
    run_folder.require_same(checkpoint, now)
