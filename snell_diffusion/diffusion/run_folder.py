"""The folder of one run: what it holds, when it may be written to, and what a resume must match."""

import json
import os
from pathlib import Path
from typing import Any

from snell_diffusion.adapters.export_tokens import EMBEDS_GLOB, EMBEDS_NAME
from snell_diffusion.diffusion.concepts import ConceptConfig
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_values
from snell_diffusion.diffusion.config_groups import Feedback
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.checkpoints import Checkpoint, CheckpointFolder
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.files import cannot_write, process_alive, remove, sweep
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


class RunFolder:
    """Files of a run below `output_dir`.

    Args:
        config: Names the folder and says whether an earlier run may be replaced or resumed.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output_dir)
        self.config = config
        self.checkpoints = CheckpointFolder(
            self.path / "checkpoints", config.checkpoints_total_limit
        )

    @property
    def adapter_file(self) -> str:
        return ADAPTER_FILES[kind_of(self.config.method)]

    def class_images(self, concept: ConceptConfig) -> Path:
        """Where the class images of a concept are."""
        if concept.class_data_dir is not None:
            return Path(concept.class_data_dir)
        return self.path / CLASS_IMAGES / (concept.name or "")

    def check(self) -> None:
        """Refuse a folder that another run is using, or whose results would be lost.

        Raises:
            SnellaConfigError: Says which, and what to do.
        """
        self._require_unused()
        if self.config.resume_from_checkpoint or self.config.overwrite:
            return
        found = [name for name in (*FILES, "checkpoints") if (self.path / name).exists()]
        if found:
            raise SnellaConfigError(
                f"run folder '{self.path}' holds an earlier run ({', '.join(found[:4])}); choose "
                f"another output_dir, continue it with --resume_from_checkpoint latest, or replace "
                f"it with --overwrite"
            )

    def _require_unused(self) -> None:
        status = self._status()
        pid = status.get("pid")
        ended = status.get("state") in ("finished", "stopped", "failed")
        if not ended and self._is_another(pid, status.get("created")):
            raise SnellaConfigError(
                f"run folder '{self.path}' is in use by process {pid}; wait, stop it, or choose "
                f"another output_dir"
            )

    @staticmethod
    def _is_another(pid: Any, created: Any) -> bool:
        """Whether a status names a living process that is not this one."""
        if not isinstance(pid, int) or pid < 1 or pid == os.getpid():
            return False
        return process_alive(pid, created if isinstance(created, float) else None)

    def _status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "status.json").read_text("utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def take(self) -> None:
        """Make the folder ready to be written to: the first change of a run on disk.

        What killed processes left unfinished is removed. So is what an earlier run wrote (nothing
        else), if `overwrite` asks for it; class images stay, for they cost time, and their note
        says whether they still fit.

        Raises:
            SnellaConfigError: Another run took the folder while this one was loading.
            OutputError: The disk does not let us.
        """
        self._require_unused()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.checkpoints.restore_replaced()
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            sweep(folder)
        if self.config.overwrite and not self.config.resume_from_checkpoint:
            words = [path.name for path in self.path.glob(EMBEDS_GLOB)]
            for name in (*FILES, *words, *FOLDERS):
                if name != CLASS_IMAGES:
                    remove(self.path / name)

    def find_checkpoint(self, warn: Any) -> Checkpoint | None:
        """The checkpoint that `resume_from_checkpoint` asks for, verified.

        Raises:
            CheckpointError: There is none, or the one named is damaged.
        """
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return None
        self.checkpoints.restore_replaced()
        if wanted not in ("latest", "auto"):
            return self.checkpoints.load(Path(wanted))
        checkpoint = self.checkpoints.latest(warn)
        if checkpoint is None and wanted == "latest":
            raise CheckpointError(
                f"resume_from_checkpoint is 'latest', but '{self.checkpoints.root}' holds no valid "
                f"checkpoint; use 'auto' to start anew in that case"
            )
        return checkpoint


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
    """Refuse to continue a run with other settings.

    Raises:
        CheckpointError: Lists every difference, field by field.
    """
    then = checkpoint.state.get("identity")
    class_images = checkpoint.state.get("class_images", 0)
    if not isinstance(then, dict) or not isinstance(class_images, (str, type(None))):
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: state.json does not say which run it belongs to"
        )
    missing = "nothing"
    differing = sorted(
        k for k in then.keys() | now.keys() if then.get(k, missing) != now.get(k, missing)
    )
    if differing:
        lines = "; ".join(
            f"{k}: {then.get(k, missing)!r} then, {now.get(k, missing)!r} now" for k in differing
        )
        raise CheckpointError(
            f"checkpoint {checkpoint.path} belongs to a run with other settings: {lines}. Continue "
            f"with the settings in {checkpoint.path.parent.parent / 'config.yaml'}, or start anew "
            f"in another output_dir"
        )
