"""One JSON file per run: what it measured, and a digest of the settings it was measured with.

A record is written when its run is finished, so a comparison goes on where it was cut off. One
whose settings differ from the plan's is noticed and never mixed with the others.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from snell_diffusion.errors import SnellaFileError
from snell_diffusion.training.files import write_json

DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Record:
    """What one run measured.

    Attributes:
        method: Its name in the plan.
        subject: The subject's folder name.
        seed: Seed of the run.
        digest: Of all settings and photos that the numbers depend on.
        learning_rate: That it was trained with.
        loss_before: Held-out loss of the base: mean squared error of the denoiser on photos that
            were not trained on, at fixed timesteps with fixed noise.
        loss_after: The same with what was trained.
        drift: Relative change of the base's predictions without the token, see `drift`.
        trainable: Trained numbers.
        stored_bytes: Size of the adapter file (or of all weights, where all are trained).
        seconds: Wall time of the training.
        peak_bytes: Most memory of the training beyond what was there before; see `memory`.
        peak_kind: What was counted for it.
        curve: (step, held-out loss) over the training.
        kept: Per layer: its name, how many entries of its update are kept, how many there are;
            for methods whose update has zeros.
        failed: Why there are no numbers: the run diverged; "" for a run that ended well.
        images: Digest of the settings of its pictures; "" while there are none.
        scores: Measured on the pictures, by name: value, and model or space it was taken in.
        date: When it was measured, UTC.
    """

    method: str
    subject: str
    seed: int
    digest: str
    learning_rate: float
    loss_before: float | None = None
    loss_after: float | None = None
    drift: float | None = None
    trainable: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    peak_kind: str = "not measured"
    curve: list[list[float]] = field(default_factory=list)
    kept: list[list[Any]] = field(default_factory=list)
    failed: str = ""
    images: str = ""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    date: str = ""

    @property
    def gain(self) -> float:
        """Held-out loss after training / before it; below 1 = learned, infinite = diverged."""
        if self.failed or self.loss_before is None or self.loss_after is None:
            return math.inf
        return self.loss_after / self.loss_before


def digest_of(settings: Mapping[str, Any]) -> str:
    """Short SHA-256 of plain values; the order of keys does not matter."""
    text = json.dumps(settings, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def save_record(path: Path, record: Record) -> None:
    """Write a record in one step."""
    write_json(path, asdict(record))


def record_of(values: Any, where: object) -> Record:
    """A record from plain values.

    Raises:
        SnellaFileError: They are none; says what is missing or unknown.
    """
    known = {item.name for item in fields(Record)}
    if not isinstance(values, dict) or set(values) - known:
        unknown = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else "no table"
        raise SnellaFileError(f"{where}: expected a record of a run, found {unknown}")
    try:
        return Record(**values)
    except TypeError as error:
        raise SnellaFileError(f"{where}: {str(error).partition(' ')[2]}") from error


def read_record(path: Path) -> Record:
    """Read what `save_record` wrote.

    Raises:
        SnellaFileError: The file cannot be read, or is no record.
    """
    try:
        return record_of(json.loads(path.read_text("utf-8")), path)
    except (OSError, ValueError) as error:
        if isinstance(error, SnellaFileError):
            raise
        raise SnellaFileError(f"{path}: not a readable record: {error}; remove it") from error


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, sorted by file name.

    Raises:
        SnellaFileError: There are none, or one cannot be read.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SnellaFileError(f"no records in {folder}: run the comparison first")
    return [read_record(file) for file in files]
