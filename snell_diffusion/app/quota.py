"""How much one user may keep: checked before work begins, with what to do when it is too much."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from snell_diffusion.app.cache import folder_bytes
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaValueError

MIB = 2**20
RUN = 64 * MIB  # bytes that a run must find free: photos, pictures, adapter and saved states
SPARE = 256 * MIB  # bytes that stay free on the disk


@dataclass(frozen=True)
class Usage:
    """What one user has.

    Attributes:
        bytes: Disk space of everything.
        runs, drafts: How many there are.
    """

    bytes: int
    runs: int
    drafts: int


class Quota:
    """The bounds of one workspace.

    Args:
        root: Folder of the workspace; it need not exist yet.
        limits: Bytes and numbers.
    """

    def __init__(self, root: Path, limits: Limits = LIMITS) -> None:
        self.root = root
        self._limits = limits

    def usage(self) -> Usage:
        """What is there now."""
        counts = [sum(1 for _ in (self.root / name).glob("*/")) for name in ("runs", "drafts")]
        return Usage(folder_bytes(self.root), *counts)

    def require_room(self, more: int) -> None:
        """Refuse to store what would not fit.

        Args:
            more: Bytes that are about to be written.

        Raises:
            SnellaValueError: Over the user's disk space, or the disk itself is full.
        """
        used, allowed = self.usage().bytes, self._limits.quota_bytes
        if used + more > allowed:
            raise SnellaValueError(
                f"there is no room: {used / MIB:.0f} of {allowed / MIB:.0f} MB are used and this "
                f"needs {more / MIB:.0f} MB more; delete runs in the Runs tab first"
            )
        if shutil.disk_usage(_existing(self.root)).free < more + SPARE:
            raise SnellaValueError(
                "the server's disk is full: delete runs in the Runs tab, or ask whoever runs this "
                "server to free some space"
            )

    def require_run(self) -> None:
        """Refuse another run where there are too many, or where it would not fit.

        Raises:
            SnellaValueError: As said.
        """
        runs = self.usage().runs
        if runs >= self._limits.runs:
            raise SnellaValueError(
                f"there are {runs} runs already, and {self._limits.runs} may be kept: delete some "
                "in the Runs tab first"
            )
        self.require_room(RUN)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
