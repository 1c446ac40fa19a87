"""How much memory a run needs, computed from the sizes of its base before anything is loaded."""

from snell_diffusion.diffusion.memory.compute import Computed, compute

__all__ = ["Computed", "compute"]
