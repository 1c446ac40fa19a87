"""The whole model on every process: one process, or data parallelism (DDP).

What torch's DDP wrapper would overlap with the backward pass is one small exchange here, since only
adapters train; without the wrapper, modules keep their names and classes.
"""

from snell_diffusion.training.parallel.base import Parallel


class Replicated(Parallel):
    """Whole models everywhere."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "none" if self.world == 1 else "DDP"
