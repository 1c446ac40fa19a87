"""How the processes of one run share its work: one file per strategy behind `base.Parallel`."""

from snell_diffusion.training.parallel.base import Parallel, digest_of
from snell_diffusion.training.parallel.replicated import Replicated
from snell_diffusion.training.parallel.topology import Topology, start

__all__ = ["Parallel", "Replicated", "Topology", "digest_of", "start"]
