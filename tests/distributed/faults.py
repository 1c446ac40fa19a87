"""What goes wrong in one of several processes; installed in it, after the fork."""

import math
import os
import signal
from collections.abc import Callable
from typing import Any

from snell_diffusion.diffusion import training
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.tuners import Competition


def die() -> None:
    """Be killed, as by the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_loss(step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a step: between its start and its loss."""
    build = training.build_loss

    def build_loss(*args: Any) -> Any:
        loss_at = build(*args)

        def interrupted(at: int, micro: int) -> Any:
            if at == step:
                action()
            return loss_at(at, micro)

        return interrupted

    training.build_loss = build_loss


def spoil_loss(step: int) -> None:
    """Make the loss of a step NaN."""
    build = training.build_loss

    def build_loss(*args: Any) -> Any:
        loss_at = build(*args)

        def spoiled(at: int, micro: int) -> Any:
            loss, parts = loss_at(at, micro)
            return (loss * math.nan if at == step else loss), parts

        return spoiled

    training.build_loss = build_loss


def before_publishing(step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a save: all files are written, none is published."""
    publish = CheckpointFolder._publish

    def interrupted(self: CheckpointFolder, temporary: Any, final: Any) -> None:
        if final == self.path(step):
            action()
        publish(self, temporary, final)

    CheckpointFolder._publish = interrupted  # type: ignore[method-assign]


def after_allocation(step: int, action: Callable[[Competition], None]) -> None:
    """Do something to the layers' levels, right after they were set for a step."""
    update = Competition.update

    def changed(self: Competition, at: int) -> bool:
        found = update(self, at)
        if at == step:
            action(self)
        return found

    Competition.update = changed  # type: ignore[method-assign]
