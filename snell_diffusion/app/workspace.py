"""Who owns what: a workspace per user, and the one app that all of them share."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snell_diffusion.app.bases import Bases
from snell_diffusion.app.drafts import Drafts
from snell_diffusion.app.jobs import SCRIPT, Jobs
from snell_diffusion.app.library import Library
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.app.quota import Quota
from snell_diffusion.app.studio import Studio

OWNER = "local"  # folder of the person at this machine, who needs no name


class Workspace:
    """All that one user has: nothing of it can be named from another workspace.

    Args:
        root: Folder of this user.
        script: Training script.
        lock: Held while a run of any user is being started.
        busy: Whether a run of any user trains; by default a run of this one.
        bases: What adapters may fit; by default the shipped ones.
        limits: Bounds of what is kept.
    """

    def __init__(
        self,
        root: Path,
        script: Path = SCRIPT,
        lock: Any = None,
        busy: Callable[[], bool] | None = None,
        bases: Bases | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        self.root = root
        self.quota = Quota(root, limits)
        room = self.quota.require_room
        self.drafts = Drafts(root / "drafts", limits, room)
        self.jobs = Jobs(root / "runs", script, lock, busy)
        self.library = Library(root / "adapters", self.jobs, bases or Bases.of(), limits, room)

    def require_room(self, more: int) -> None:
        """Refuse to store `more` bytes where they do not fit; see `Quota.require_room`."""
        self.quota.require_room(more)


class Workspaces:
    """The workspaces of all users below one root folder.

    Args:
        root: Holds one folder per user.
        script: Training script.
        bases: What adapters may fit; by default the shipped ones.
        limits: Bounds of what is kept.
    """

    def __init__(
        self,
        root: Path,
        script: Path = SCRIPT,
        bases: Bases | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        self.root = root.resolve()
        self._script = script
        self._bases = bases or Bases.of()
        self._limits = limits
        self._made: dict[str, Workspace] = {}
        self._lock = threading.Lock()
        self._starting = threading.RLock()

    def of(self, username: str | None) -> Workspace:
        """The workspace of a user; None is the person at this machine.

        Folders are named by a digest, so no letter of a name reaches the disk.
        """
        name = OWNER if username is None else hashlib.sha256(username.encode()).hexdigest()[:32]
        return self._named(name)

    def _named(self, name: str) -> Workspace:
        with self._lock:
            if name not in self._made:
                self._made[name] = Workspace(
                    self.root / name,
                    self._script,
                    self._starting,
                    lambda: self.training() is not None,
                    self._bases,
                    self._limits,
                )
            return self._made[name]

    def training(self) -> tuple[str, str] | None:
        """(folder of the user, id) of the run that trains on this server, None while none does.

        Users that did not come back since the server started count too.
        """
        with self._starting:
            for runs in sorted(self.root.glob("*/runs")):
                job = self._named(runs.parent.name).jobs.active()
                if job is not None:
                    return runs.parent.name, job
        return None


@dataclass
class App:
    """What every tab and endpoint works on.

    Attributes:
        workspaces: Of all users.
        studio: The one worker that owns the pipelines.
        exposed: Whether the page can be reached from other machines.
        limits: Bounds of what may be asked for.
    """

    workspaces: Workspaces
    studio: Studio
    exposed: bool = False
    limits: Limits = field(default_factory=lambda: LIMITS)

    @property
    def bases(self) -> Bases:
        """The base models that may be chosen."""
        return self.studio.bases
