"""The folder of one run: what it holds, when it may be written to, and what a resume must match."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from snell_diffusion.diffusion.config import Feedback, TrainConfig
from snell_diffusion.diffusion.config_files import config_values
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.checkpoints import Checkpoint, CheckpointFolder
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.files import process_alive

CLASS_IMAGES = "class_images"
ADAPTER_FILES = {
    "snella": "pytorch_snella_weights.safetensors",
    "lora": "pytorch_lora_weights.safetensors",
}
FILES = (
    "config.yaml",
    "log.jsonl",
    "status.json",
    "loss.png",
    "allocation.png",
    "samples.png",
    "README.md",
    *ADAPTER_FILES.values(),
)
FOLDERS = ("samples", "checkpoints", CLASS_IMAGES, "logs")

# Settings that a resumed run may change without changing what is trained.
FREE = frozenset(Feedback.__dataclass_fields__) - {
    "validation_data_dir",
    "num_validation_photos",
} | {
    "output_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "overwrite",
    "dry_run",
    "sample_batch_size",
    "class_data_dir",
    "instance_data_dir",
    "validation_data_dir",
    "pretrained_model_name_or_path",
    "revision",
    "variant",
}


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
        return ADAPTER_FILES[self.config.method]

    @property
    def class_images(self) -> Path:
        given = self.config.class_data_dir
        return self.path / CLASS_IMAGES if given is None else Path(given)

    def check(self) -> None:
        """Refuse a folder that another run is using, or whose results would be lost.

        Raises:
            SnellaConfigError: Says which, and what to do.
        """
        status = self._status()
        pid = status.get("pid")
        running = status.get("state") not in ("finished", "stopped", "failed")
        if running and isinstance(pid, int) and pid != os.getpid() and process_alive(pid):
            raise SnellaConfigError(
                f"run folder '{self.path}' is in use by process {pid}; wait, stop it, or choose "
                f"another output_dir"
            )
        if self.config.resume_from_checkpoint or self.config.overwrite:
            return
        found = [name for name in (*FILES, "checkpoints") if (self.path / name).exists()]
        if found:
            raise SnellaConfigError(
                f"run folder '{self.path}' holds an earlier run ({', '.join(found[:4])}); choose "
                f"another output_dir, continue it with --resume_from_checkpoint latest, or replace "
                f"it with --overwrite"
            )

    def _status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "status.json").read_text("utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def clear(self) -> None:
        """Remove what an earlier run wrote here (nothing else), if `overwrite` asks for it.

        Class images stay: they cost time, and their note says whether they still fit.
        """
        if not self.config.overwrite or self.config.resume_from_checkpoint:
            return
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in FOLDERS:
            if name != CLASS_IMAGES and (self.path / name).is_dir():
                shutil.rmtree(self.path / name)

    def find_checkpoint(self, warn: Any) -> Checkpoint | None:
        """The checkpoint that `resume_from_checkpoint` asks for, verified.

        Raises:
            CheckpointError: There is none, or the one named is damaged.
        """
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return None
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
    """What must be equal for a run to continue another: settings, photos, base, process count."""
    settings = {k: v for k, v in config_values(config).items() if k not in FREE}
    return {**settings, "photos": data, "base": base, "processes": processes}


def require_same(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        CheckpointError: Lists every difference, field by field.
    """
    then = checkpoint.state["identity"]
    differing = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
    if differing:
        lines = "; ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in differing)
        raise CheckpointError(
            f"checkpoint {checkpoint.path} belongs to a run with other settings: {lines}"
        )
