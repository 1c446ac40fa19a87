"""The adapters of one workspace: those of its runs, and uploaded files.

<root>/<id>.safetensors   an uploaded file, checked before it is stored
<root>/<id>.json          what the lists show of it; written last, so a half file is in no list
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from snell_diffusion.adapters import read_adapter, read_header
from snell_diffusion.adapters.foreign import describe_foreign
from snell_diffusion.adapters.schema import Header
from snell_diffusion.app.bases import Bases, fitting
from snell_diffusion.app.ids import is_id, new_id
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaError, SnellaValueError, printable

LABEL = 60  # characters of an adapter's name in a list
UNLISTED = "choose an adapter from the list; this is not the id of one"
GONE = "this adapter is no longer there; choose another from the list"


@dataclass(frozen=True)
class Adapter:
    """One adapter that can be drawn with.

    Attributes:
        id: 32 hex digits; a run's adapter has the id of its run.
        label: What lists show.
        path: Its file.
        base_id: Id of the base it was trained on; None if no base of this server fits.
        uploaded: Whether it came as a file instead of from a run.
        prompt: What its photos were captioned with; may be empty.
    """

    id: str
    label: str
    path: Path
    base_id: str | None
    uploaded: bool
    prompt: str = ""


DRAWN = "snella"
"""The method that the page's sliders and maps are about; SNELL, KLoRA and MixK are stored as it."""


class Library:
    """Adapters by id.

    Args:
        root: Folder of the uploaded ones; made when the first comes.
        jobs: The runs whose adapters are listed too.
        bases: What adapters may fit.
        limits: Size and number of uploads.
        require_room: Called with the bytes that are about to be stored; raises if there is no room.
    """

    def __init__(
        self,
        root: Path,
        jobs: Jobs,
        bases: Bases,
        limits: Limits = LIMITS,
        require_room: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.root = root
        self._jobs = jobs
        self._bases = bases
        self._limits = limits
        self._require_room = require_room

    def all(self) -> list[Adapter]:
        """Every adapter that can be drawn with: those of runs, newest first, then uploads."""
        found = [self._of_run(job) for job in self._jobs.all()]
        return [adapter for adapter in found if adapter is not None] + self._uploads()

    def get(self, adapter: Any) -> Adapter:
        """An adapter by its id.

        Raises:
            SnellaValueError: Not the id of one, or it is gone, or its run has none yet.
        """
        if not is_id(adapter):
            raise SnellaValueError(UNLISTED)
        uploaded = self._uploaded(adapter)
        if uploaded is not None:
            return uploaded
        if adapter not in self._jobs.all():
            raise SnellaValueError(GONE)
        path = self._jobs.adapter(adapter)
        found = self._of_run(adapter)
        if found is None:
            raise SnellaValueError(_why_not(path, "the file of this run"))
        return found

    def left_out(self) -> list[tuple[str, str]]:
        """(label, reason) of the runs whose file is there but is no SNELLA adapter."""
        rows = []
        for job in self._jobs.all():
            path = self._file(job)
            if path is not None and header_of(path) is None:
                rows.append((run_label(self._jobs.info(job)), _why_not(path, "the file")))
        return rows

    def add(self, upload: str | Path, name: str | None = None) -> Adapter:
        """Check an uploaded file and keep a copy of it.

        Args:
            upload: Where the server has put it.
            name: What its owner calls it; default the file's own name.

        Returns:
            The new adapter, or the one of the same content that is there already.

        Raises:
            SnellaError: Too large, no SNELLA adapter, damaged, or no room; nothing is stored then.
        """
        path = Path(upload)
        shown = clean(name or path.stem)
        size = path.stat().st_size if path.is_file() else 0
        if not 0 < size <= self._limits.adapter_bytes:
            raise SnellaValueError(
                f"{shown} has {size / 2**20:.1f} MB; an adapter file of up to "
                f"{self._limits.adapter_bytes / 2**20:.0f} MB is taken"
            )
        content = path.read_bytes()
        file = self._checked(content, path, shown)
        known = [row for row in self._uploads() if self._record(row.id)["digest"] == file.digest]
        if known:
            return known[0]
        self._require_place(size)
        record = {"label": shown, "digest": file.digest, "stored": time.time()}
        return self._store(content, record)

    def delete(self, adapter: str) -> None:
        """Remove an uploaded adapter.

        Raises:
            SnellaValueError: There is none of that id, or it belongs to a run.
        """
        if not self.get(adapter).uploaded:
            raise SnellaValueError("this adapter belongs to a run: delete the run in the Runs tab")
        (self.root / f"{adapter}.json").unlink(missing_ok=True)
        (self.root / f"{adapter}.safetensors").unlink(missing_ok=True)

    def _checked(self, content: bytes, path: Path, shown: str) -> Any:
        try:
            file = read_adapter(content, shown)
        except SnellaError as error:
            raise SnellaValueError(_why_not(path, shown, str(error))) from error
        others = {part.method for part in file.header.components.values()} - {DRAWN}
        if others:
            raise SnellaValueError(
                f"{shown} is an adapter of the method {', '.join(sorted(others))}, and this page "
                "draws with SNELLA's: load it with load_snella_weights in Python"
            )
        return file

    def _require_place(self, size: int) -> None:
        if len(self._uploads()) >= self._limits.uploaded_adapters:
            raise SnellaValueError(
                f"{self._limits.uploaded_adapters} adapters are uploaded already: delete one first"
            )
        self._require_room(size)

    def _store(self, content: bytes, record: dict[str, Any]) -> Adapter:
        self.root.mkdir(parents=True, exist_ok=True)
        adapter = new_id()
        try:
            _replace(self.root / f"{adapter}.safetensors", content)
            _replace(self.root / f"{adapter}.json", json.dumps(record).encode())
        except OSError as error:
            (self.root / f"{adapter}.safetensors").unlink(missing_ok=True)
            raise SnellaValueError(
                f"the file could not be stored ({error.strerror}): free some space and try again"
            ) from error
        return self.get(adapter)

    def _uploads(self) -> list[Adapter]:
        names = [path.stem for path in self.root.glob("*.json") if is_id(path.stem)]
        newest = sorted(names, key=lambda name: self._record(name)["stored"], reverse=True)
        found = [self._uploaded(name) for name in newest]
        return [adapter for adapter in found if adapter is not None]

    def _record(self, adapter: str) -> dict[str, Any]:
        text = (self.root / f"{adapter}.json").read_text("utf-8")
        record: dict[str, Any] = json.loads(text)
        return record

    def _uploaded(self, adapter: str) -> Adapter | None:
        path = self.root / f"{adapter}.safetensors"
        if not (self.root / f"{adapter}.json").is_file() or not path.is_file():
            return None
        header = header_of(path)
        if header is None:
            return None
        label = f"{self._record(adapter)['label']} (uploaded)"
        return self._entry(adapter, label, path, header, uploaded=True)

    def _file(self, job: str) -> Path | None:
        try:
            return self._jobs.adapter(job)
        except SnellaError:  # not finished, or deleted in this moment
            return None

    def _of_run(self, job: str) -> Adapter | None:
        path = self._file(job)
        header = None if path is None else header_of(path)
        if path is None or header is None:
            return None
        return self._entry(job, run_label(self._jobs.info(job)), path, header, uploaded=False)

    def _entry(
        self, adapter: str, label: str, path: Path, header: Header, *, uploaded: bool
    ) -> Adapter:
        prompt = str(header.metadata.get("instance_prompt", ""))
        base = base_of(header, self._bases)
        return Adapter(adapter, label, path, base, uploaded, printable(prompt))


def base_of(header: Header, bases: Bases) -> str | None:
    """Id of the base that an adapter file was trained on, or of one that is built the same."""
    source = header.origin.source
    for base in bases.all():
        if source is not None and base.source == source:
            return base.id
    parts = {
        name: None if part.base is None else (part.base.model, part.base.config_hash)
        for name, part in header.components.items()
    }
    return next((base.id for base in fitting(bases, parts, source)), None)


def header_of(path: Path) -> Header | None:
    """The header of an adapter file; None if it has none that can be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _header(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _header(path: Path, version: int, size: int) -> Header | None:
    try:
        return read_header(path)[0]
    except SnellaError:
        return None


def run_label(info: dict[str, Any]) -> str:
    """How lists call a run: its label and when it started."""
    return f"{info['label']} ({time.strftime('%d %b %H:%M', time.localtime(info['started']))})"


def clean(name: str) -> str:
    """A file's name as a label: no folders, printable, one line, at most LABEL characters."""
    name = re.split(r"[/\\]", name)[-1].removesuffix(".safetensors")
    text = " ".join(printable(name).split())
    return text[:LABEL] or "adapter"


def _why_not(path: Path, shown: str, fault: str = "it cannot be read") -> str:
    """Why a file cannot be drawn with, and what to do."""
    hint = "choose the pytorch_snella_weights.safetensors of a SNELLA run"
    try:
        foreign = describe_foreign(path)
    except SnellaError:
        return f"{shown} is not a whole .safetensors file: {hint}"
    if foreign is None:
        return f"{fault}" if fault.startswith(shown) else f"{shown}: {fault}"
    kind = re.search(r"^kind +not a SNELLA adapter; (.*)$", foreign, re.MULTILINE)
    what = kind[1] if kind else "a file of another program"
    return f"{shown} is not a SNELLA adapter but {what}: {hint}"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
