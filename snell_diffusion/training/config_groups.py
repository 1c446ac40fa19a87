"""Settings that the runs of every trainer have: where results go, and how a run goes on."""

from pydantic.dataclasses import dataclass

from snell_diffusion.training.config_types import FROZEN, Count, Seed, described


@dataclass(**FROZEN)
class RunSettings:
    """Folder, seed and checkpoints of a run; trainers add when a checkpoint is due, and theirs."""

    output_dir: str | None = described(None, "Run folder. null writes nothing.")
    seed: Seed = described(
        0, "Seed of everything random, 0 to 2**63 - 1; the same seed gives the same result."
    )
    checkpoints_total_limit: Count | None = described(
        1, "Checkpoints to keep, at least 1; older ones are removed after a new one is written."
    )
    resume_from_checkpoint: str | None = described(
        None,
        "latest: the newest valid checkpoint of output_dir, an error if there is none. auto: the "
        "same, or a new run. Or a checkpoint folder.",
    )
    overwrite: bool = described(False, "Replace the results of an earlier run in output_dir.")
