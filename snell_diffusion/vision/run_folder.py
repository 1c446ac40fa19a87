"""The folder of a classification run, and what makes it the same run."""

from pathlib import Path
from typing import Any

from snell_diffusion.training.run_folder import RunFolder
from snell_diffusion.vision.config import VisionConfig, config_values
from snell_diffusion.vision.saving import FILES, MODEL_FOLDER

_FILES = (
    *("config.yaml", "log.jsonl", "status.json", "result.json"),
    *("curve.png", "confusion.png", "allocation.png"),
    *FILES,
)
_FOLDERS = ("checkpoints", "logs", MODEL_FOLDER)

# Settings that a resumed run may change: they change nothing that is trained or chosen. Images and
# the base are compared by content, wherever they lie.
FREE = frozenset(
    {
        *("base", "revision", "data_dir", "check_images", "cache_images", "num_workers"),
        *("eval_batch_size", "output_dir", "checkpointing_epochs", "checkpoints_total_limit"),
        *("resume_from_checkpoint", "overwrite", "report_to", "quiet", "levels"),
    }
)


def run_folder(config: VisionConfig) -> RunFolder | None:
    """The folder of a run; None for one that writes nothing."""
    if config.output_dir is None:
        return None
    return RunFolder(
        Path(config.output_dir),
        _FILES,
        _FOLDERS,
        overwrite=config.overwrite,
        resume=config.resume_from_checkpoint,
        limit=config.checkpoints_total_limit,
    )


def identity(config: VisionConfig, data: str, base: str, processes: int) -> dict[str, Any]:
    """What must be equal for a run to continue another, as plain JSON values.

    Args:
        config: Settings; those in FREE are left out.
        data: Digest of the images and labels.
        base: Digest of the base model.
        processes: Processes that share a batch. They may change as long as the images of a step
            stay the same, unless something is drawn at random in the model.
    """
    settings = {k: v for k, v in config_values(config).items() if k not in FREE}
    one = settings.pop("train_batch_size") * settings.pop("gradient_accumulation_steps")
    settings["images_per_step"] = one * processes
    if config.dropout or config.drop_path or config.backbone_drop_path:
        settings["processes"] = processes
    return {**settings, "images": data, "base": base}
