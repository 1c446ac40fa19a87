"""Why a run ended early, each with the exit code that a script returns for it."""

from snell_diffusion.errors import SnellaError


class TrainingError(SnellaError):
    """A run cannot start or go on; `exit_code` is what a script returns."""

    exit_code = 2


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class OutputError(TrainingError):
    """The disk refused a file of the run; earlier checkpoints are untouched."""


class NonFiniteError(TrainingError):
    """A loss, gradient or weight became NaN or infinite; nothing was updated or saved with it."""

    exit_code = 3


class DivergedError(TrainingError):
    """The processes of a run hold different states; none of them goes on."""

    exit_code = 4


class UploadError(TrainingError):
    """A finished run could not be uploaded; everything it wrote is there."""

    exit_code = 5


class Interrupted(TrainingError):
    """SIGINT or SIGTERM arrived; the state was saved. Exit code 130 or 143 (128 + signal)."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
